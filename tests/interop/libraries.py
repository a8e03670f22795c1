"""Every array library the tests know: how it takes a store without moving it, and where its arrays lie.

A store is a NumPy array of values; uint16 patterns stand for bfloat16 (see `tests.ops.arrays`).
"""

import ctypes
import math

import numpy as np
import pytest

from tests.ops import arrays

KNOWN = ["numpy", "torch", "jax"]
FOREIGN = ["array_api_strict", "tvm_ffi"]
LIBRARIES = KNOWN + FOREIGN


def carry(store, library):
    """The store as the library's array, in the store's own memory (JAX: in a copy)."""
    pytest.importorskip(library)
    if library in KNOWN:
        return arrays.carry(store, library)
    if library == "array_api_strict":
        import array_api_strict

        return array_api_strict.from_dlpack(store)
    import tvm_ffi

    return tvm_ffi.from_dlpack(arrays.carry(store, "torch") if store.dtype == np.uint16 else store)


def can_carry(library, dtype, layout):
    if library == "array_api_strict":
        return dtype in ("float32", "float64")
    if library == "tvm_ffi":
        return not (dtype == "bfloat16" and layout == "negative")
    return arrays.can_carry(library, layout)


def address(x):
    """Where the first element lies, by the library's own account."""
    match type(x).__module__.partition(".")[0]:
        case "numpy":
            return x.ctypes.data
        case "torch" | "tvm_ffi":
            return x.data_ptr()
        case "jaxlib":
            return x.unsafe_buffer_pointer()
        case "array_api_strict":
            return x._array.ctypes.data
    raise KeyError(type(x))


def memory(array):
    """The memory of a described array as a writable store, whatever flags say."""
    dtype = np.dtype("uint16" if array.dtype == "bfloat16" else array.dtype)
    reach = [s * (n - 1) * dtype.itemsize for s, n in zip(array.strides, array.shape, strict=True)]
    if not math.prod(array.shape):
        return np.empty(array.shape, dtype)
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + dtype.itemsize
    block = (ctypes.c_char * (high - low)).from_address(array.pointer + low)
    return np.ndarray(array.shape, dtype, block, -low, [s * dtype.itemsize for s in array.strides])


CASES = [
    pytest.param(library, dtype, layout, id=f"{library}-{dtype}-{layout}")
    for library in LIBRARIES
    for dtype in arrays.DTYPES
    for layout in arrays.LAYOUTS
    if can_carry(library, dtype, layout)
]
"""(library, dtype, layout) of every array a library can hold."""
