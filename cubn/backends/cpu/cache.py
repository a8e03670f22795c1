"""Object files of kernels: kept in a folder, and found again by later processes.

The key covers everything an object file depends on, the source of this package included, so an edit is never stale. A
cache that cannot be written or read is no error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

__all__ = ["cache_folder", "fingerprint", "llvm", "load", "store", "without_llvmlite"]


def without_llvmlite(error: ImportError) -> ImportError:
    """What to say where llvmlite is not installed or cannot be loaded."""
    return ImportError(
        f"cubn: the CPU backend needs llvmlite, which cannot be imported ({error}). "
        "Install it with: pip install llvmlite"
    )


try:
    import llvmlite.binding as llvm

    _VERSIONS = [sys.version, f"llvmlite {metadata.version('llvmlite')}"]
except ImportError as error:
    raise without_llvmlite(error) from error


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


@functools.cache
def fingerprint() -> str:
    """Everything all object files depend on: the source of this package, the compilers, the processor."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    machine = [llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    digest.update("\n".join(_VERSIONS + machine).encode())
    return digest.hexdigest()[:20]


def _path(name: str) -> Path | None:
    folder = cache_folder()
    return folder / fingerprint() / f"{name}.o" if folder else None


def load(name: str) -> bytes | None:
    """The object file, or None if there is none or it is not whole."""
    path = _path(name)
    try:
        content = path.read_bytes() if path else b""
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def store(name: str, code: bytes) -> None:
    """Keep an object file, if there is a place to."""
    path = _path(name)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
