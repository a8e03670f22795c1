"""Kernels compiled once: numba makes LLVM IR, LLVM makes an object file, a cache keeps it, later processes just load
it.

A process that finds its kernels in the cache never imports numba.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cubn.backends.cpu import cache
from cubn.backends.cpu.cache import llvm, without_numba

logger = logging.getLogger("cubn")
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
_compiling = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has no thread that would finish what another had begun to compile
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )
_engines: list[llvm.ExecutionEngine] = []  # what they loaded lives as long as they do


class Kernel(NamedTuple):
    """A native `call(parameters, worker)`, which releases the GIL, and its address."""

    call: Callable[[int, int], None]
    address: int


@functools.cache
def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
        jit=True,
    )


def compiled(name: str, build: Callable[[], Callable[[int, int], None]]) -> Kernel:
    """The native `kernel(parameters, worker)` that `build()` gives as a numba-compilable Python function."""
    with _compiling:
        code = cache.load(name)
        if code is None:
            with _announced(name):
                code = _object_code(build)
            cache.store(name, code)
        return _load(code)


def _object_code(build: Callable[[], Callable[[int, int], None]]) -> bytes:
    from cubn.backends.cpu.language import llvm_ir

    machine = _machine()
    module = llvm.parse_assembly(llvm_ir({"kernel": build()}))
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False  # kernels are written in vectors
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _load(code: bytes) -> Kernel:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address("kernel")
    return Kernel(_SIGNATURE(address), address)


@contextlib.contextmanager
def _announced(name: str) -> Iterator[None]:
    """Say what is being compiled if it takes longer than a second."""
    timer = threading.Timer(1.0, logger.warning, ["cubn: compiling %s for this processor, once", name])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
