"""Arrays read through their capsules, and memory of ours that their libraries take over."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cubn import _layout
from cubn._arrays import dlpack
from cubn._arrays.library import HOST, ITEMSIZE, Array, Library
from cubn._arrays.memory import in_bytes, storage, view
from cubn._arrays.numpy import address_of
from cubn._arrays.refusals import facts, refuse_device, refuse_dtype, refuse_misaligned
from cubn._layout import Shape, Strides
from cubn.backends import CPU, CUDA
from cubn.errors import message

_ALIGNMENT = 64
_LEGACY_STREAM = 1  # DLPack's number for CUDA's legacy default stream, where the CUDA backend works on such arrays
_OTHER_DEVICES = {
    3: "pinned host memory",
    4: "opencl",
    7: "vulkan",
    8: "metal",
    10: "rocm",
    13: "cuda managed memory",
    14: "oneapi",
}


def read(x: Any, function: str, argument: str, dtypes: tuple[str, ...], library: Library) -> Array:
    """Describe x by its capsule."""
    kind = int(x.__dlpack_device__()[0])
    if kind not in (CPU, CUDA):
        refuse_device(x, _OTHER_DEVICES.get(kind, f"DLPack device type {kind}"), function, argument)
    try:
        tensor = dlpack.read(x, None if kind == CPU else _LEGACY_STREAM)
    except BufferError as error:
        rule = "be an array its library can export"
        raise BufferError(message(function, argument, rule, f"'{error}'", **facts(x))) from error
    capsule, pointer, shape, strides, dtype, device, writable = tensor
    if strides is None:
        strides = _layout.c_strides(shape)
    array = Array(pointer, shape, strides, dtype, HOST if kind == CPU else device, writable, x, library, capsule)
    if dtype not in dtypes:
        refuse_dtype(array, dtype, dtypes, function, argument)
    if pointer % ITEMSIZE[dtype]:
        refuse_misaligned(array, function, argument, f"address {pointer:#x}")
    return array


def new_output(
    shape: Shape, strides: Strides, dtype: str, device: tuple[int, int], library: Library
) -> tuple[Array, dlpack.Exporter]:
    """Memory of ours for an output of a library, and what it will take it over from."""
    if device[0] == CPU:
        buffer = _buffer(shape, strides, dtype)
        pointer, capsule_of = buffer.ctypes.data, None
    else:
        from cubn.backends import cuda

        buffer = cuda.new_buffer(shape, in_bytes(strides, ITEMSIZE[dtype]), storage(dtype), device[1])
        pointer, capsule_of = buffer.data.ptr, cuda.capsule_of
    exporter = dlpack.Exporter(buffer, dtype, capsule_of)
    return Array(pointer, shape, strides, dtype, device, True, buffer, library), exporter


def _buffer(shape: Shape, strides: Strides, dtype: str) -> np.ndarray[Any, Any]:
    """Host memory aligned as JAX asks for it: what is not, it copies."""
    stored = storage(dtype)
    memory = np.empty(math.prod(shape) * stored.itemsize + _ALIGNMENT, np.uint8)
    offset = -address_of(memory) % _ALIGNMENT
    return np.ndarray(shape, stored, memory, offset, in_bytes(strides, stored.itemsize))


def host_copy(array: Array) -> np.ndarray[Any, Any]:
    """The memory's bits, as `storage` has them, in NumPy."""
    if array.device[0] == CPU:
        return np.array(view(array))
    from cubn.backends import cuda

    strides = in_bytes(array.strides, ITEMSIZE[array.dtype])
    bits: np.ndarray[Any, Any] = cuda.host_copy(
        array.pointer, array.shape, strides, storage(array.dtype), array.owner, array.device[1]
    )
    return bits
