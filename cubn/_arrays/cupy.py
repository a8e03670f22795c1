"""CuPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cubn._arrays.library import ALIGNMENT, Allocate, Array, Layout, Library, Output
from cubn._arrays.memory import in_bytes, rounded
from cubn._arrays.numpy import NUMPY, layout_of
from cubn._arrays.refusals import refuse_device, refuse_dtype, refuse_misaligned
from cubn._layout import Shape, Strides
from cubn._types import CUDA


class Cupy(Library):
    """CuPy, through its arrays' own attributes."""

    name = "cupy"
    fixed = True
    conversion = NUMPY.conversion

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.is_rocm = bool(cupy.cuda.runtime.is_hip)

    def describe(self, x: Any, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        if self.is_rocm:
            refuse_device(x, "rocm", argument)
        strides, name = layout_of(x.shape, x.strides, x.dtype)
        if name not in dtypes:
            refuse_dtype(x, name, dtypes, argument, self.conversion)
        if strides is None:
            refuse_misaligned(x, argument, f"strides of {x.strides} bytes")
        pointer = x.data.ptr
        if pointer % x.itemsize:
            refuse_misaligned(x, argument, f"address {pointer:#x}")
        return Array(pointer, x.shape, strides, name, (CUDA, x.device.id), True, x, self)

    def signature(self, x: Any) -> tuple[Layout, int] | None:
        memory = x.data
        pointer = memory.ptr
        return (x.shape, x.strides, x.dtype, pointer % ALIGNMENT, memory.device_id), pointer

    def layout(self, array: Array) -> Layout | None:
        dtype = array.owner.dtype
        strides = in_bytes(array.strides, dtype.itemsize)
        return array.shape, strides, dtype, array.pointer % ALIGNMENT, array.device[1]

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        storage = _storage(dtype, like)
        with like.owner.device:
            memory = self._cupy.cuda.alloc(max(math.prod(shape), 1) * storage.itemsize)
            y = self._cupy.ndarray(shape, storage, memory, in_bytes(strides, storage.itemsize))
        return Output(Array(y.data.ptr, shape, strides, dtype, like.device, True, y, self), lambda: y)

    def allocator(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Allocate:
        storage, index = _storage(dtype, like), like.device[1]
        size, steps = max(math.prod(shape), 1) * storage.itemsize, in_bytes(strides, storage.itemsize)
        cuda, ndarray = self._cupy.cuda, self._cupy.ndarray
        alloc, current_device, device = cuda.alloc, cuda.runtime.getDevice, cuda.Device(index)

        def allocate(x: Any) -> tuple[Any, int]:
            if current_device() == index:
                memory = alloc(size)
            else:
                with device:
                    memory = alloc(size)
            return ndarray(shape, storage, memory, steps), memory.ptr

        return allocate

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        with like.owner.device:
            return self._cupy.array(rounded(values, dtype), dtype)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = array.owner.get()
        return values.astype("float32") if array.dtype == "bfloat16" else values


def _storage(dtype: str, like: Array) -> np.dtype[Any]:
    """NumPy has no bfloat16 of its own."""
    found: np.dtype[Any] = like.owner.dtype if dtype == like.dtype else np.dtype(dtype)
    return found
