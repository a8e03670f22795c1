"""The processor kernels are compiled for, and what it cannot do."""

from __future__ import annotations

import functools
import os

import llvmlite.binding as llvm

_HALVES = """
define float @widened(half %h) {
  %f = fpext half %h to float
  ret float %f
}
define half @narrowed(float %f) {
  %h = fptrunc float %f to half
  ret half %h
}
"""


@functools.cache
def target() -> tuple[str, str]:
    """Name and features of the processor, as LLVM spells them: this one, or what numba's variables say.

    NUMBA_CPU_NAME=generic stands for every processor of the architecture, as it does for numba.
    """
    name = os.environ.get("NUMBA_CPU_NAME", llvm.get_host_cpu_name())
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if name.lower() == "generic" else llvm.get_host_cpu_features().flatten()
    return name, features


@functools.cache
def converts_halves() -> bool:
    """Whether the processor converts float16 to float32 and back by instructions.

    LLVM would call functions of a compiler's run-time library instead, which no process has: __extendhfsf2 and
    __truncsfhf2. So it is asked what it makes of two conversions. x86-64 has the instructions with F16C (2012 and
    later), AArch64 always.
    """
    name, features = target()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=name, features=features)
    code = machine.emit_object(llvm.parse_assembly(_HALVES))
    return not any(called in code for called in (b"hfsf2", b"sfhf2", b"h2f_ieee", b"f2h_ieee"))
