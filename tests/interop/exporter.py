"""A DLPack producer in ctypes, with every field of its capsule to be set: for what no library would export.

Nothing of cubn's own reader is used, so the two check each other. Layouts are those of dlpack.h, version 1.
"""

import ctypes
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CPU, CUDA = 1, 2
FLOAT, BFLOAT, BOOL = 2, 4, 6


class Tensor(ctypes.Structure):
    """DLTensor, flat: the device is (device_type, device_index), the type (code, bits, lanes)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor, from before version 1."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


_ALIVE: dict[int, tuple[Any, ...]] = {}  # by context: what a capsule out there points to
_contexts = itertools.count(1)

_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi  # by index: attributes are shared with whoever else sets argument types
_new = _api["PyCapsule_New"]
_new.argtypes, _new.restype = (ctypes.c_void_p, ctypes.c_char_p, _Destructor), ctypes.py_object
_is_valid = _api["PyCapsule_IsValid"]
_is_valid.argtypes, _is_valid.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
_get = _api["PyCapsule_GetPointer"]
_get.argtypes, _get.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_void_p
_rename = _api["PyCapsule_SetName"]
_rename.argtypes, _rename.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int

_NAMES = {Managed: b"dltensor", Versioned: b"dltensor_versioned"}
_USED = {Managed: b"used_dltensor", Versioned: b"used_dltensor_versioned"}


def _deleter(kind):
    def delete(address):
        _ALIVE.pop(kind.from_address(address).context, None)

    return _Deleter(delete)


_DELETERS = {kind: _deleter(kind) for kind in _NAMES}


@_Destructor
def _destroy(capsule):
    """A capsule that nobody consumed calls the deleter itself."""
    for kind, name in _NAMES.items():
        if _is_valid(capsule, name):
            _DELETERS[kind](_get(capsule, name))


def alive():
    """How many capsules' memory is held."""
    return len(_ALIVE)


@dataclass
class Exporter:
    """An object with `__dlpack__`. What is not given is as for a float32 array over `memory`.

    `shape`, `strides` and `data` may be None, for NULL; `device` is what the capsule says, `claimed` what
    `__dlpack_device__` does. `returned` is what `__dlpack__` returns instead of a capsule, `raised` what it raises.
    """

    shape: tuple[int, ...] | None = (2, 3)
    strides: tuple[int, ...] | None = (3, 1)
    memory: Any = field(default_factory=lambda: np.arange(6, dtype=np.float32))
    data: int | None = -1  # that of memory
    byte_offset: int = 0
    ndim: int | None = None
    device: tuple[int, int] = (CPU, 0)
    claimed: Any = None
    code: int = FLOAT
    bits: int = 32
    lanes: int = 1
    version: tuple[int, int] | None = (1, 0)  # None: from before there were any
    flags: int = 0
    is_used: bool = False
    returned: Any = None
    raised: BaseException | None = None

    def __dlpack_device__(self):
        if isinstance(self.claimed, BaseException):
            raise self.claimed
        return self.device if self.claimed is None else self.claimed

    def __dlpack__(self, **options):
        if self.raised is not None:
            raise self.raised
        if self.returned is not None:
            return self.returned
        kind = Managed if self.version is None else Versioned
        shape, strides = (None if v is None else (ctypes.c_int64 * len(v))(*v) for v in (self.shape, self.strides))
        capsule = kind()
        capsule.tensor = Tensor(
            self.memory.ctypes.data if self.data == -1 else self.data,
            *self.device,
            len(self.shape or ()) if self.ndim is None else self.ndim,
            self.code,
            self.bits,
            self.lanes,
            ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
            ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)),
            self.byte_offset,
        )
        if kind is Versioned:
            capsule.major, capsule.minor = self.version
            capsule.flags = self.flags
        capsule.context = context = next(_contexts)
        capsule.deleter = ctypes.cast(_DELETERS[kind], ctypes.c_void_p)
        _ALIVE[context] = (capsule, shape, strides, self.memory)
        made = _new(ctypes.addressof(capsule), _NAMES[kind], _destroy)
        if self.is_used:  # its consumer took it and let it go
            _rename(made, _USED[kind])
            _ALIVE.pop(context)
        return made
