"""Floating-point arithmetic as IEEE-754 has it, whatever the calling thread has set.

A thread may round in another direction, flush subnormal numbers to zero or trap exceptions. The C library saves, sets
and restores all of that, on any processor. Its functions are here for Python code, and their addresses for native code.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ROOM = 128
"""Bytes of an environment; the C libraries' own take 32 or less."""

_Environment = ctypes.c_char * ROOM
_library = ctypes.PyDLL("ucrtbase" if sys.platform == "win32" else None)  # which keeps the GIL: it takes no time
_save, _set = _library.fegetenv, _library.fesetenv
_save.argtypes = _set.argtypes = [ctypes.c_void_p]


def _address_of_default() -> int:
    """The C library's FE_DFL_ENV."""
    for name in ("_FE_DFL_ENV", "__fe_dfl_env"):  # of macOS; of the BSDs and of PowerPC
        with contextlib.suppress(ValueError):
            return ctypes.addressof(ctypes.c_byte.in_dll(_library, name))
    if sys.platform != "win32":
        return -1  # of glibc and musl
    before = _Environment()
    _save(before)
    _library._fpreset()
    _save(_default_of_windows)
    _set(before)
    return ctypes.addressof(_default_of_windows)


_default_of_windows = _Environment()
DEFAULT = _address_of_default()
SAVE, SET = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (_save, _set))


def default_floating_point(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: compute as IEEE-754 has it by default; the caller's settings and flags come back."""

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        callers = _Environment()
        _save(callers)
        try:
            _set(DEFAULT)
            return function(*args, **kwargs)
        finally:
            _set(callers)

    return computed
