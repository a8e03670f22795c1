"""A DLPack producer in ctypes, with every field of its capsule to be set: for what no library would export."""

import ctypes
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.dlpack import NAMES, Managed, Tensor, Versioned, address_of, integers, new

CPU, CUDA = 1, 2
FLOAT, BFLOAT, BOOL = 2, 4, 6


_ALIVE: dict[int, tuple[Any, ...]] = {}  # by context: what a capsule out there points to
_contexts = itertools.count(1)

_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_is_valid = _api["PyCapsule_IsValid"]  # by address: a destructor must not hold the capsule again
_is_valid.argtypes, _is_valid.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
_get = _api["PyCapsule_GetPointer"]
_get.argtypes, _get.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_void_p
_rename = _api["PyCapsule_SetName"]
_rename.argtypes, _rename.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int

_USED = {Managed: b"used_dltensor", Versioned: b"used_dltensor_versioned"}


def _deleter(kind):
    def delete(address):
        _ALIVE.pop(kind.from_address(address).context, None)

    return _Deleter(delete)


_DELETERS = {kind: _deleter(kind) for kind in NAMES}


@_Destructor
def _destroy(capsule):
    """A capsule that nobody consumed calls the deleter itself."""
    for kind, name in NAMES.items():
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
        shape, strides = integers(self.shape), integers(self.strides)
        capsule = kind()
        capsule.tensor = Tensor(
            self.memory.ctypes.data if self.data == -1 else self.data,
            *self.device,
            len(self.shape or ()) if self.ndim is None else self.ndim,
            self.code,
            self.bits,
            self.lanes,
            address_of(shape),
            address_of(strides),
            self.byte_offset,
        )
        if kind is Versioned:
            capsule.major, capsule.minor = self.version
            capsule.flags = self.flags
        capsule.context = context = next(_contexts)
        capsule.deleter = ctypes.cast(_DELETERS[kind], ctypes.c_void_p)
        _ALIVE[context] = (capsule, shape, strides, self.memory)
        made = new(ctypes.addressof(capsule), NAMES[kind], ctypes.cast(_destroy, ctypes.c_void_p))
        if self.is_used:  # its consumer took it and let it go
            _rename(made, _USED[kind])
            _ALIVE.pop(context)
        return made
