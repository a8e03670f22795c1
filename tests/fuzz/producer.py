"""A library that cubn has never heard of: arrays of any dtype, strides and flags, known by their capsules alone."""

import ctypes
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from tests.dlpack import NAMES, Managed, Tensor, Versioned, address_of, integers, new

VERSIONED, UNVERSIONED = NAMES[Versioned], NAMES[Managed]
READ_ONLY, IS_COPIED = 1, 2
CODES = {
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "bool": (6, 8),
    "int64": (0, 64),
    "uint8": (1, 8),
}
"""DLPack's type code, and bits, of dtypes by name."""

_is_valid = ctypes.pythonapi["PyCapsule_IsValid"]
_is_valid.argtypes, _is_valid.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


@dataclass(frozen=True)
class Fields:
    """All that a capsule says, but for where its memory is. shape or strides None: a NULL pointer."""

    shape: tuple[int, ...] | None
    strides: tuple[int, ...] | None
    code: int
    bits: int
    lanes: int = 1
    ndim: int | None = None  # other than len(shape)
    device: tuple[int, int] = (1, 0)
    byte_offset: int = 0
    flags: int = 0
    version: tuple[int, int] = (1, 0)
    name: bytes = VERSIONED


_alive = deque(maxlen=10_000)  # the structs of the latest capsules, and the names


def capsule(fields, address):
    """A capsule of these fields for memory at an address. It frees nothing."""
    shape, strides = integers(fields.shape), integers(fields.strides)
    tensor = Tensor(
        address or None,
        *fields.device,
        len(fields.shape or ()) if fields.ndim is None else fields.ndim,
        fields.code,
        fields.bits,
        fields.lanes,
        address_of(shape),
        address_of(strides),
        fields.byte_offset,
    )
    if fields.name.endswith(VERSIONED):
        managed = Versioned(*fields.version, None, None, fields.flags, tensor)
    else:
        managed = Managed(tensor, None, None)
    _alive.append((managed, shape, strides, fields.name))
    return new(ctypes.addressof(managed), fields.name, None)


class Foreign:
    """An array of that library, over a NumPy store (uint16 patterns stand for bfloat16)."""

    def __init__(self, store, dtype=None):
        self.store = store
        code, bits = CODES[dtype or ("bfloat16" if store.dtype == np.uint16 else store.dtype.name)]
        strides = tuple(s // store.itemsize for s in store.strides)
        self.fields = Fields(store.shape, strides, code, bits)

    def __dlpack_device__(self):
        return self.fields.device

    def __dlpack__(self, *, max_version=None, stream=None, dl_device=None, copy=None):
        return capsule(self.fields, self.store.ctypes.data)

    def __array_namespace__(self):
        return _NAMESPACE


def from_dlpack(x):
    """The array of an exporter, in its memory."""
    exported = x.__dlpack__(max_version=(1, 0))
    kind, name = (Versioned, VERSIONED) if _is_valid(exported, VERSIONED) else (Managed, UNVERSIONED)
    tensor = kind.from_address(_pointer(exported, name)).tensor
    dtype = next(name for name, code in CODES.items() if code == (tensor.code, tensor.bits))
    store = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    shape, strides = (
        at and tuple((ctypes.c_int64 * tensor.ndim).from_address(at)) for at in (tensor.shape, tensor.strides)
    )
    memory = SimpleNamespace(capsule=exported, exporter=x)
    memory.__array_interface__ = {
        "version": 3,
        "data": ((tensor.data or 0) + tensor.byte_offset, False),
        "shape": shape or (),
        "strides": strides and tuple(s * store.itemsize for s in strides),
        "typestr": store.str,
    }
    return Foreign(np.asarray(memory), dtype)


_NAMESPACE = SimpleNamespace(from_dlpack=from_dlpack)
