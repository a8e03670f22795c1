"""Stores (see tests.ops.arrays) to arrays on a CUDA device and back, strides and all, by the bytes they span."""

import functools

import numpy as np

from cubn import _arrays, _layout
from tests.gpu.needs import need

LIBRARIES = {"numpy": "cupy", "torch": "torch", "jax": "jax"}
"""Which library's arrays stand on the device where tests of the CPU have NumPy's, PyTorch's and JAX's."""


def carry(store, library):
    """A copy of the store on the device, as an array of the library that stands for `library`."""
    return {"numpy": to_cupy, "torch": to_torch, "jax": to_jax}[library](store)


def store_of(array):
    """A copy in host memory with the array's own strides; bfloat16 as bits."""
    if isinstance(array, np.ndarray):
        return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    import cupy

    found = _arrays.describe(array, "array", (*_arrays.FLOATS, *_arrays.COUNTS))
    dtype = np.dtype("uint16" if found.dtype == "bfloat16" else found.dtype)
    low, high = _layout.span(found.shape, found.strides)
    memory = np.empty((high - low) * dtype.itemsize, np.uint8)
    cupy.cuda.runtime.deviceSynchronize()
    if memory.size:
        cupy.cuda.runtime.memcpy(
            memory.ctypes.data, found.pointer + low * dtype.itemsize, memory.size, cupy.cuda.runtime.memcpyDeviceToHost
        )
    strides = [step * dtype.itemsize for step in found.strides]
    return np.ndarray(found.shape, dtype, memory, -low * dtype.itemsize, strides)


def library_of(array):
    """The library of the CPU that the array's stands for."""
    of = _arrays.describe(array, "array").library.name
    return next(name for name, there in LIBRARIES.items() if there == of)


def _bytes_of(store):
    """(the bytes from the store's lowest address on, where its first element is among them)."""
    if not store.size:
        return np.empty(0, np.uint8), 0
    low, high = np.lib.array_utils.byte_bounds(store)
    return np.asarray(_Memory(low, high - low)).copy(), store.ctypes.data - low


class _Memory:
    """A range of addresses, as NumPy reads it."""

    def __init__(self, address, size):
        self.__array_interface__ = {"version": 3, "data": (address, True), "shape": (size,), "typestr": "|u1"}


def to_cupy(store):
    import cupy
    import ml_dtypes

    memory, first = _bytes_of(store)
    dtype = ml_dtypes.bfloat16 if store.dtype == np.uint16 else store.dtype
    held = cupy.asarray(memory) if memory.size else cupy.empty(1, np.uint8)
    return cupy.ndarray(store.shape, dtype, held.data + first, store.strides)


def to_torch(store):
    need("torch")
    import torch

    memory, first = _bytes_of(store)
    dtype = torch.bfloat16 if store.dtype == np.uint16 else torch.from_numpy(np.empty(0, store.dtype)).dtype
    held = torch.from_numpy(memory).cuda().view(dtype)
    item = store.dtype.itemsize
    return held.as_strided(store.shape, [step // item for step in store.strides], first // item)


@functools.cache
def _jax():
    need("jax")
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


def to_jax(store):
    import ml_dtypes

    values = store.view(ml_dtypes.bfloat16) if store.dtype == np.uint16 else store
    jax = _jax()
    return jax.device_put(np.ascontiguousarray(values), jax.devices("gpu")[0])
