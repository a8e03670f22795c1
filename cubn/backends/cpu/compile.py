"""Kernels compiled once: `language` makes LLVM IR (`by_numba`, where there is no source), LLVM makes an object file, a
cache keeps it, later processes just load it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from cubn.backends.cpu import cache
from cubn.backends.cpu.cache import llvm, without_numba
from cubn.backends.cpu.target import target

logger = logging.getLogger("cubn")
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
_compiling = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has no thread that would finish what another had begun to compile
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )
_engines: list[llvm.ExecutionEngine] = []  # what they loaded lives as long as they do

_kernels: dict[str, Kernel] = {}

compiled_here: list[str] = []
"""Names of the kernels that this process has compiled."""

PATIENCE = 1.0  # seconds of compiling, in all, that go without a word
OPTIMISING = 4  # times as long as the translation into LLVM's language


class Kernel(NamedTuple):
    """A native `call(parameters, worker)`, which releases the GIL, and its address."""

    call: Callable[[int, int], None]
    address: int


@functools.cache
def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = target()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name,
        features=features,
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
        jit=True,
    )


def compiled(name: str, build: Callable[[], Callable[..., int | None]]) -> Kernel:
    """The native `kernel(parameters, worker)` that `build()` gives as a function in the language of kernels.

    Threads that ask for the same one at the same time wait for the first of them.
    """
    with _compiling:
        if name not in _kernels:
            code = cache.load(name)
            if code is None:
                code = _object_code(build)
                compiled_here.append(name)
                cache.store(name, code)
            _kernels[name] = _load(code)
        return _kernels[name]


def _object_code(build: Callable[[], Callable[..., int | None]]) -> bytes:
    from cubn.backends.cpu.language import NoSource, llvm_ir

    with _stopwatch:
        kernel = build()
        try:
            text = llvm_ir({"kernel": kernel})
            _stopwatch.announce()
        except NoSource:
            text = _by_numba(kernel)
        return _optimised(text)


def _by_numba(kernel: Callable[..., int | None]) -> str:
    """LLVM IR of a kernel whose source is not there, or not the one it was loaded from."""
    try:
        from cubn.backends.cpu.by_numba import llvm_ir
    except ImportError as error:
        raise without_numba(error) from error
    return llvm_ir(kernel, "kernel")


def _optimised(text: str) -> bytes:
    """The object file of a module of LLVM IR."""
    machine = _machine()
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False  # kernels are written in vectors
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


class _Stopwatch:
    """The time this process has spent compiling, announced once if it is about to be long."""

    def __init__(self) -> None:
        self.spent, self.begin, self.announced = 0.0, 0.0, False

    def __enter__(self) -> None:
        self.begin = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.spent += time.monotonic() - self.begin

    def announce(self) -> None:
        """To be called when a kernel is translated, which foretells how long the rest will take on this machine."""
        total = self.spent + (1 + OPTIMISING) * (time.monotonic() - self.begin)
        if total > PATIENCE and not self.announced:
            self.announced = True
            logger.warning("cubn: compiling kernels for this CPU, about %d s, once", math.ceil(total))


_stopwatch = _Stopwatch()


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
