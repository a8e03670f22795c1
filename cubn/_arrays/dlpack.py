"""Reading any DLPack capsule, and exporting a buffer under any dtype.

NumPy's own reader knows no bfloat16, and other libraries' readers make arrays of their own; cubn needs only an address,
strides, a dtype and a flag. Layouts are those of dlpack.h, version 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from cubn import _layout
from cubn._types import DTYPES

_NAMES = {(dtype.code, dtype.bits): name for name, dtype in DTYPES.items()}
_KINDS = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 5: "complex", 6: "bool"}
_READ_ONLY, _IS_COPIED = 1, 2
_MOST_AXES = 64  # as in NumPy
_LIMIT = 1 << 63


class Tensor(NamedTuple):
    """What a capsule says. The memory lives as long as the capsule."""

    capsule: object
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: tuple[int, int]
    writable: bool


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_is_valid = ctypes.pythonapi["PyCapsule_IsValid"]  # by index: as attributes, others would set their argument types too
_is_valid.argtypes, _is_valid.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


class Malformed(ValueError):
    """What a capsule says can be said of no array. The text says what that is."""


def export(x: Any, stream: int | None = None) -> object:
    """x's capsule.

    `stream` is where x will be read, on a CUDA device: the exporter makes that stream wait for its own work on x.
    """
    ordered = {} if stream is None else {"stream": stream}
    try:
        return x.__dlpack__(max_version=(1, 0), **ordered)
    except (TypeError, NotImplementedError):  # an exporter older than DLPack 1
        return x.__dlpack__(**ordered)


def read(capsule: object) -> Tensor:
    """What a capsule says, without consuming it. A capsule without flags, or of a copy, is not writable.

    Raises
    ------
    Malformed, Unaddressable
        If it is not one, or tells of no array that can be.
    """
    tensor, writable = _open(capsule)
    axes = tensor.ndim
    if not 0 <= axes <= _MOST_AXES:
        raise Malformed(f"{axes} axes")
    if axes and not tensor.shape:
        raise Malformed("a NULL shape")
    shape = tuple(tensor.shape[:axes])
    strides = tuple(tensor.strides[:axes]) if tensor.strides else _layout.c_strides(shape)
    low, high = _layout.span(shape, strides)
    if high > low and not tensor.data:
        raise Malformed("a NULL data pointer")
    pointer = (tensor.data or 0) + tensor.byte_offset
    size = -(-tensor.dtype.bits // 8)
    if pointer + low * size < 0 or pointer + high * size > _LIMIT:
        raise Malformed(f"elements beyond the end of memory, strides={strides}, byte_offset={tensor.byte_offset}")
    device = tensor.device.type, tensor.device.index
    return Tensor(capsule, pointer, shape, strides, _dtype_name(tensor.dtype), device, writable)


def _open(capsule: object) -> tuple[_Tensor, bool]:
    """The capsule's tensor, in place, and whether it may be written."""
    if _is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise Malformed(f"version {versioned.major}.{versioned.minor}, and cubn reads 1")
        return versioned.tensor, not versioned.flags & (_READ_ONLY | _IS_COPIED)
    if _is_valid(capsule, b"dltensor"):
        return _Tensor.from_address(_pointer(capsule, b"dltensor")), False
    raise Malformed("a used capsule" if type(capsule).__name__ == "PyCapsule" else f"a {type(capsule).__name__}")


def _dtype_name(dtype: _DataType) -> str:
    name = _NAMES.get((dtype.code, dtype.bits)) or f"{_KINDS.get(dtype.code, f'dlpack-{dtype.code}-')}{dtype.bits}"
    return name if dtype.lanes == 1 else f"{name}x{dtype.lanes}"


class Exporter:
    """A NumPy or CuPy buffer for another library to take over, as an array of `dtype`, which has its item size.

    The buffer's library makes the capsule, and frees the buffer when it is told; only the dtype written in it is
    changed. (A deleter of our own would be Python code, which a library may call after the interpreter has shut down.)
    """

    def __init__(self, buffer: Any, dtype: str, capsule_of: Callable[..., Any] | None = None) -> None:
        self.buffer = buffer
        self.dtype = dtype
        self.capsule = buffer.__dlpack__ if capsule_of is None else partial(capsule_of, buffer)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.buffer.__dlpack_device__()
        return int(kind), int(index)

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.capsule(**options)
        tensor, _ = _open(capsule)
        tensor.dtype.code, tensor.dtype.bits, _ = DTYPES[self.dtype]
        return capsule
