"""NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from cubn._arrays.library import ALIGNMENT, Allocate, Array, Layout, Library, Output
from cubn._arrays.memory import in_bytes, rounded
from cubn._arrays.refusals import refuse, refuse_dtype, refuse_misaligned
from cubn._layout import Shape, Strides, c_strides, span
from cubn._types import HOST, ITEMSIZE

read_address = ctypes.c_size_t.from_address
DATA = object.__basicsize__  # where a PyArrayObject has the address of its first element
_NO_MEMORY = np.empty(0, np.uint8)
_WORD = ctypes.sizeof(ctypes.c_void_p)
_join = b"".join


class NumPy(Library):
    """NumPy, through its arrays' own attributes."""

    name = "numpy"
    fixed = True  # but for what `Headers` see
    conversion = "Pass {0}.astype('{1}')."

    def describe(self, x: Any, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        shape = x.shape
        dtype = x.dtype
        strides, name = layout_of(shape, x.strides, dtype)
        if name not in dtypes:
            if not dtype.isnative:
                remedy = f"Pass {argument}.astype({argument}.dtype.newbyteorder('='))."
                refuse(x, argument, TypeError, "have this machine's byte order", name, remedy)
            refuse_dtype(x, name, dtypes, argument, self._conversion(dtype))
        pointer = address_of(x)
        if strides is None:
            refuse_misaligned(x, argument, f"strides of {x.strides} bytes")
        if pointer % dtype.itemsize:
            refuse_misaligned(x, argument, f"address {pointer:#x}")
        return Array(pointer, shape, strides, name, HOST, x.flags.writeable, x, self)

    def _conversion(self, dtype: np.dtype[Any]) -> str:
        if dtype.names:
            return "Pass {0}[{0}.dtype.names[0]] or another of its fields."
        return "It holds no numbers." if dtype.kind in "SUTVMm" and dtype.isbuiltin != 2 else self.conversion

    def signature(self, x: Any) -> tuple[Layout, int]:
        pointer = read_address(id(x) + DATA).value
        return (x.shape, x.strides, x.dtype, pointer % ALIGNMENT), pointer

    def layout(self, array: Array) -> Layout | None:
        dtype = array.owner.dtype
        strides = in_bytes(array.strides, dtype.itemsize)
        return (array.shape, strides, dtype, array.pointer % ALIGNMENT) if dtype_name(dtype) == array.dtype else None

    def allocator(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Allocate:
        if strides != c_strides(shape) or 0 in shape:
            return super().allocator(shape, strides, dtype, like)
        kind = np.dtype(dtype)

        def allocate(x: Any) -> tuple[Any, int]:
            y = np.empty(shape, kind)
            return y, read_address(id(y) + DATA).value

        return allocate

    def writable(self, x: Any) -> bool:
        return bool(x.flags.writeable)

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        memory = _NO_MEMORY if 0 in shape else None  # NumPy drops the strides of an array that it finds no memory for
        y: np.ndarray[Any, Any] = np.ndarray(shape, dtype, memory, 0, in_bytes(strides, ITEMSIZE[dtype]))
        pointer = address_of(y)
        return Output(Array(pointer, shape, strides, dtype, HOST, True, y, self), lambda: y)

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        return rounded(values, dtype).astype(dtype, copy=False)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        return np.array(array.owner, "float32" if array.dtype == "bfloat16" else None)


class Headers:
    """The headers of NumPy arrays of one axis, which must outlive this.

    A PyArrayObject has, after the object's header: data, number of axes, addresses of extents and strides, base, dtype
    and flags. All of them can be changed in place: `x.resize(...)`, `x.dtype = ...`, `x.flags.writeable = False`.
    """

    __slots__ = ("_axes", "_headers", "_seen")

    def __init__(self, arrays: Iterable[np.ndarray[Any, Any]]) -> None:
        starts = [id(x) + DATA for x in arrays]
        self._headers = tuple(_memory(start, 6 * _WORD + ctypes.sizeof(ctypes.c_int)) for start in starts)
        pointers = [read_address(start + i * _WORD).value for start in starts for i in (2, 3)]
        self._axes = tuple(_memory(pointer, _WORD) for pointer in pointers)
        self._seen = _join(self._headers), _join(self._axes)

    def unchanged(self) -> bool:
        """Whether all arrays are the same memory, shape, type and as writable as they were; takes 0.1 microseconds."""
        headers, axes = self._seen
        return _join(self._headers) == headers and _join(self._axes) == axes


def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def address_of(x: np.ndarray[Any, Any]) -> int:
    """Where a NumPy array's first element is.

    PyArrayObject is the object's header, then the data pointer. Every compiled extension relies on that, and reading it
    takes an eighth of the time of `x.ctypes.data`.
    """
    return read_address(id(x) + DATA).value


@lru_cache(maxsize=1024)
def layout_of(shape: Shape, strides: Strides, dtype: np.dtype[Any]) -> tuple[Strides | None, str]:
    """Strides in elements, or None where a step is no whole number of them; and the dtype's name."""
    name = dtype_name(dtype)
    size = dtype.itemsize or 1
    if any(extent > 1 and stride % size for extent, stride in zip(shape, strides, strict=True)):
        return None, name
    steps = tuple(stride // size for stride in strides)
    span(shape, steps)  # an error where they are Unaddressable
    return steps, name


@lru_cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """`float32`; with the byte order, `>f4`, where that is not the machine's own."""
    return dtype.name if dtype.isnative else dtype.str


NUMPY = NumPy()
