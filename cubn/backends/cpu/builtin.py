"""Native code as a builtin function of Python, which costs a tenth of a call through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

FASTCALL = 0x0080  # METH_FASTCALL: PyObject *function(PyObject *self, PyObject *const *arguments, Py_ssize_t count)


class Definition(ctypes.Structure):
    """A PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def definition(name: str, address: int) -> Definition:
    of = Definition(name.encode(), address, FASTCALL, None)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(of))  # its functions look at it as long as they are there
    return of


def function(of: Definition, itself: object) -> Callable[..., Any]:
    """A function whose native code is given `itself` first."""
    return _new(ctypes.byref(of), itself, None)  # type: ignore[no-any-return]


def address(name: str) -> int:
    """Of a function of Python's C API."""
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)(
    ("PyCFunction_NewEx", ctypes.pythonapi)
)
