"""Kernels compiled once: numba makes LLVM IR, LLVM makes an object file, a cache keeps it, later processes just load
it.

A process that finds its kernels in the cache never imports numba. The cache key covers everything an object file
depends on, the source of this package included, so an edit is never stale. A cache that cannot be written or read is no
error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple


def _without_numba(error: ImportError) -> ImportError:
    """What to say where numba, or llvmlite below it, is not installed or does not suit the other packages."""
    return ImportError(
        f"cubn: the CPU backend needs numba, which cannot be imported ({error}). "
        "Install it with: pip install 'cubn[cpu]'"
    )


try:
    import llvmlite.binding as llvm

    _VERSIONS = [sys.version, *(f"{name} {metadata.version(name)}" for name in ("numba", "llvmlite"))]
except ImportError as error:
    raise _without_numba(error) from error

logger = logging.getLogger("cubn")
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
_compiling = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has no thread that would finish what another had begun to compile
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )
_engines: list[llvm.ExecutionEngine] = []  # what they loaded lives as long as they do


def cache_folder() -> Path | None:
    """Where object files are kept: $CUBN_CACHE_DIR, else the user's cache folder; None if that is switched off with
    ''.
    """
    asked = os.environ.get("CUBN_CACHE_DIR")
    if asked is not None:
        return Path(asked) if asked else None
    try:
        import platformdirs
    except ImportError:
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "cubn"
    return Path(platformdirs.user_cache_dir("cubn", appauthor=False))


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


@functools.cache
def _fingerprint() -> str:
    """Everything all object files depend on: the source of this package, the compilers, the processor."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    machine = [llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    digest.update("\n".join(_VERSIONS + machine).encode())
    return digest.hexdigest()[:20]


def compiled(name: str, build: Callable[[], Callable[[int, int], None]]) -> Kernel:
    """The native `kernel(parameters, worker)` that `build()` gives as a numba-compilable Python function."""
    with _compiling:
        code = _cached(name)
        if code is None:
            with _announced(name):
                code = _object_code(build)
            _keep(name, code)
        return _load(code)


def _object_code(build: Callable[[], Callable[[int, int], None]]) -> bytes:
    try:
        import numba
    except ImportError as error:
        raise _without_numba(error) from error
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


def _path(name: str) -> Path | None:
    folder = cache_folder()
    return folder / _fingerprint() / f"{name}.o" if folder else None


def _cached(name: str) -> bytes | None:
    """The object file, or None if there is none or it is not whole."""
    path = _path(name)
    try:
        content = path.read_bytes() if path else b""
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _keep(name: str, code: bytes) -> None:
    path = _path(name)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)


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
