"""Object files of kernels: kept in a folder, and found again by later processes.

The key covers everything an object file depends on, the source of this package included, so an edit is never stale.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import marshal
import os
import pkgutil
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from cubn.backends.folder import cache_folder, examined
from cubn.backends.kernel_files import keep, read

__all__ = ["cache_folder", "fingerprint", "llvm", "load", "state", "store", "without_numba"]

ENDING = ".o"

SHARED = ("cubn._types", "cubn._floating_point", "cubn._tree")
"""The modules outside this package that kernels take constants from."""

WITHOUT_EFFECT = re.compile("NUMBA_(CUDA_|THREADING_|CACHE_|(NUM_THREADS|DISABLE_(CUDA|JIT)|FULL_TRACEBACKS)$)")
"""Variables of numba that change nothing in the code it makes for this package."""


def without_numba(error: ImportError) -> ImportError:
    """What to say where numba, or llvmlite below it, is not installed or does not suit the other packages."""
    return ImportError(
        f"cubn: the CPU backend needs numba, which cannot be imported ({error}). "
        "Install what is missing with: pip install numba llvmlite"
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # as in a frozen application, which has the modules alone
        return str(importlib.import_module(distribution).__version__)


try:
    import llvmlite.binding as llvm

    from cubn.backends.cpu.target import target

    VERSIONS = [sys.version, *(f"{name} {_version(name)}" for name in ("numba", "llvmlite"))]
except ImportError as error:
    raise without_numba(error) from error


def _source(module: str) -> bytes:
    """What a module is made of: the file it was loaded from, source or bytecode, or the code its loader has."""
    spec = importlib.util.find_spec(module)
    loader: Any = spec and spec.loader
    try:
        content: bytes = loader.get_data(spec and spec.origin)
    except (AttributeError, OSError, TypeError):
        code = loader.get_code(module)
        if code is None:
            raise ImportError(f"nothing is known of {module}") from None
        content = marshal.dumps(code)
    return content


def _modules() -> list[str]:
    """Every module that kernels are made from, and more."""
    package = sys.modules[__package__]
    return [*SHARED, *sorted(found.name for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."))]


@functools.cache
def _software() -> str:
    """The source of all kernels, the compilers and the processor; "" if some of the source cannot be found."""
    modules = _modules()
    if modules == [*SHARED]:  # this package's loader cannot list them
        return ""
    digest = hashlib.sha256()
    try:
        for module in modules:
            digest.update(f"{module} ".encode() + hashlib.sha256(_source(module)).digest())
    except (AttributeError, ImportError, ValueError):
        return ""
    machine = [llvm.get_default_triple(), *target()]
    digest.update("\n".join([*VERSIONS, str(llvm.llvm_version_info), *machine]).encode())
    return digest.hexdigest()


def _settings() -> str:
    """What numba is told by variables and by its file, both of which it reads anew whenever it compiles."""
    told = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_")]
    told = [setting for setting in told if not WITHOUT_EFFECT.match(setting.partition("=")[0])]
    if os.path.isfile(".numba_config.yaml"):
        with contextlib.suppress(OSError):
            told.append(Path(".numba_config.yaml").read_text(errors="surrogateescape"))
    return "\n".join(told)


def fingerprint() -> str:
    """Everything all object files depend on: the source of this package, the compilers, their settings, the processor.

    "" if the source cannot be found, nor bytecode in its stead: nothing may be kept then.
    """
    software = _software()
    key = f"{software}\n{_settings()}".encode(errors="surrogateescape")
    return software and hashlib.sha256(key).hexdigest()[:20]


def load(name: str) -> bytes | None:
    """The object file, or None if there is none, or none that is whole and may be run."""
    return read(fingerprint(), name, ENDING)


def store(name: str, code: bytes) -> None:
    """Keep an object file, if there is a place to."""
    if _software.__wrapped__() == _software():  # else another version was installed while this process ran
        keep(fingerprint(), name, ENDING, code)


def state() -> str:
    """Where kernels are kept, and whether they can be, in words."""
    return examined(fingerprint())
