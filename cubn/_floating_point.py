"""Floating-point arithmetic as IEEE-754 has it, whatever the calling thread has set.

A thread may round in another direction, flush subnormal numbers to zero or trap exceptions. The C library saves, sets
and restores all of that, on any processor. Its functions are here for Python code, and their addresses for native code.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

ROOM = 128
"""Bytes of an environment; the C libraries' own take 32 or less."""

_library = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
_save, _set = _library.fegetenv, _library.fesetenv
_save.argtypes = _set.argtypes = [ctypes.c_void_p]


def _address_of_default() -> int:
    """The C library's FE_DFL_ENV."""
    for name in ("_FE_DFL_ENV", "__fe_dfl_env"):  # of macOS; of the BSDs and of PowerPC
        with contextlib.suppress(ValueError):
            return ctypes.addressof(ctypes.c_byte.in_dll(_library, name))
    if sys.platform != "win32":
        return -1  # of glibc and musl
    before = ctypes.create_string_buffer(ROOM)
    _save(before)
    _library._fpreset()
    _save(_default_of_windows)
    _set(before)
    return ctypes.addressof(_default_of_windows)


_default_of_windows = ctypes.create_string_buffer(ROOM)
DEFAULT = _address_of_default()
SAVE, SET = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (_save, _set))


@contextlib.contextmanager
def default_floating_point() -> Iterator[None]:
    """Compute as IEEE-754 has it by default; the caller's settings and flags come back. Also a decorator."""
    callers = ctypes.create_string_buffer(ROOM)
    _save(callers)
    _set(DEFAULT)
    try:
        yield
    finally:
        _set(callers)
