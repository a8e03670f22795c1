"""A library that cubn has never heard of: arrays of any dtype, strides and flags, known by their capsules alone."""

import ctypes
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

VERSIONED, UNVERSIONED = b"dltensor_versioned", b"dltensor"
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

_new = ctypes.pythonapi.PyCapsule_New
_new.argtypes, _new.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes, _is_valid.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


class Tensor(ctypes.Structure):
    """DLTensor of dlpack.h; pointers are plain addresses, so that any can be written down."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor, as exporters older than DLPack 1 make it."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


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
    shape, strides = ((ctypes.c_int64 * len(v))(*v) if v is not None else None for v in (fields.shape, fields.strides))
    tensor = Tensor(
        address or None,
        *fields.device,
        len(fields.shape or ()) if fields.ndim is None else fields.ndim,
        fields.code,
        fields.bits,
        fields.lanes,
        ctypes.addressof(shape) if shape is not None else None,
        ctypes.addressof(strides) if strides is not None else None,
        fields.byte_offset,
    )
    if fields.name.endswith(VERSIONED):
        managed = ManagedVersioned(*fields.version, None, None, fields.flags, tensor)
    else:
        managed = Managed(tensor, None, None)
    _alive.append((managed, shape, strides, fields.name))
    return _new(ctypes.addressof(managed), fields.name, None)


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
    kind, name = (ManagedVersioned, VERSIONED) if _is_valid(exported, VERSIONED) else (Managed, UNVERSIONED)
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
