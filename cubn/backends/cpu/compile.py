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
from cubn.backends.cpu.target import target

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
    name, features = target()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name,
        features=features,
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
    try:
        import numba
    except ImportError as error:
        raise without_numba(error) from error
    signature = numba.types.void(numba.types.intp, numba.types.intp)
    with _switched_on(numba.config):
        entry = numba.cfunc(signature, nogil=True, error_model="numpy")(build())
    module = llvm.parse_assembly(entry.inspect_llvm())
    module.get_function(entry.native_name).name = "kernel"
    return bytes(_machine().emit_object(module))


@contextlib.contextmanager
def _switched_on(config: Any) -> Iterator[None]:
    """NUMBA_DISABLE_JIT is for functions that run without it, as these do not."""
    disabled = config.DISABLE_JIT
    config.DISABLE_JIT = 0
    try:
        yield
    finally:
        config.DISABLE_JIT = disabled


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
