"""Tensors read natively: layouts and addresses of all that a call is given, in one call of native code."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cubn import _calls
from cubn.backends.cpu import builtin, native_tensors
from cubn.backends.cpu.compile import compiled

Found = tuple[Any, ...]
"""A key, equal for tensors of equal layouts, then the address of each tensor, 0 for what is absent."""

_C_API = (
    "PyErr_Clear",
    "PyBytes_FromStringAndSize",
    "PyTuple_New",
    "PyLong_FromVoidPtr",
    "PyLong_AsLongLong",
    "Py_IncRef",
)


def read(*tensors: Tensor | None) -> Found | None:
    """A key for the layouts of tensors, and their addresses; None where they have to be described one by one.

    That a tensor requires a gradient makes no difference. It must not hold numbers with the other sign (`is_neg`).
    """
    return _reader()(*tensors)


@cache
def _reader() -> Callable[..., Found | None]:
    describe = _dltensor_from_py_object()
    return _builtin("read", describe) if describe else _read_each


@cache
def counter() -> Callable[[int], None]:
    """What adds 1 to the int64 at an address, on the CPU."""
    return _builtin("count", 0)


def _builtin(name: str, describe: int) -> Callable[..., Any]:
    words = struct.pack("8q", describe, *map(builtin.address, _C_API), id(None))
    kernel = compiled(f"tensors-{name}", lambda: getattr(native_tensors, name))
    return builtin.function(builtin.definition(name, kernel.address), words)


def _dltensor_from_py_object() -> int:
    """The function of DLPack's exchange API that describes a tensor and owns nothing; 0 where there is none."""
    exchange = getattr(torch._C, "_dlpack_exchange_api", None)  # since torch 2.10
    if exchange is None:
        return 0
    api = _pointer(exchange(), b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(api).value != 1:  # its major version
        return 0
    return ctypes.c_uint64.from_address(api + 40).value


def _read_each(*tensors: Tensor | None) -> Found | None:
    """The same by attributes."""
    layouts, addresses = [], []
    for tensor in tensors:
        found = (None, 0) if tensor is None else _calls.signature(tensor.detach())
        if found is None:
            return None
        layouts.append(found[0])
        addresses.append(found[1])
    return tuple(layouts), *addresses


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
