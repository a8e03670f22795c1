"""Arrays read through their capsules, and memory of ours that their libraries take over."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from cubn._arrays import dlpack
from cubn._arrays.library import Array, Library
from cubn._arrays.memory import in_bytes, storage, view
from cubn._arrays.numpy import address_of
from cubn._arrays.refusals import facts, refuse_device, refuse_dtype, refuse_misaligned
from cubn._layout import Shape, Strides, Unaddressable
from cubn._types import CPU, CUDA, HOST, ITEMSIZE
from cubn._weak import Leases
from cubn.errors import device_name, message

_ALIGNMENT = 64
LEGACY_STREAM = 1  # DLPack's number for CUDA's legacy default stream, where the CUDA backend works on such arrays
_OTHER_DEVICES = {
    3: "pinned host memory",
    4: "opencl",
    7: "vulkan",
    8: "metal",
    10: "rocm",
    13: "cuda managed memory",
    14: "oneapi",
}


class DeviceMemory(Protocol):
    """Memory of a kind of device, in arrays that can be exported."""

    def new_buffer(self, shape: Shape, strides: Strides, dtype: Any, index: int) -> Any:
        """An array of its own memory, with these strides in bytes; its elements fill it."""

    def capsule_of(self, buffer: Any, **options: Any) -> Any:
        """The DLPack capsule of a new buffer, ordered behind the work that wrote it."""

    def host_copy(self, pointer: int, shape: Shape, strides: Strides, dtype: Any, index: int) -> Any:
        """What is in the memory, in NumPy; strides in bytes. Waits for the work before it."""

    def hold(self, things: tuple[object, ...], index: int) -> None:
        """Keep things until the backends' work so far on arrays that are read through capsules is done."""


_memory_of: dict[int, Callable[[], DeviceMemory]] = {}


def provide(device_type: int, memory: Callable[[], DeviceMemory]) -> None:
    """Let memory of a kind of device be had; nothing is imported for it before it is asked for."""
    _memory_of[device_type] = memory


class _Reader:
    """While it is there, what a capsule tells of may be given to a device."""


_read_on: dict[int, Leases[object]] = {}
"""Capsules of arrays on each CUDA device. Without them memory is its library's to use again, which knows nothing of
work of ours that is under way.
"""


def _kept_on(index: int, capsule: object) -> object:
    """What stands for a capsule of a device, which is kept until the work is done that its readers have launched."""
    readers = _read_on.get(index) or _read_on.setdefault(index, Leases())  # the same for all threads
    if ended := readers.ended():
        _memory_of[CUDA]().hold(ended, index)
    reader = _Reader()
    readers.lend(capsule, reader)
    return reader


def read(x: Any, argument: str, dtypes: tuple[str, ...], library: Library) -> Array:
    """Describe x by its capsule."""
    claimed = _device(x, argument)
    kind = claimed[0]
    if kind not in (CPU, CUDA):
        refuse_device(x, _OTHER_DEVICES.get(kind, f"DLPack device type {kind}"), argument)
    rule = "be an array its library can export"
    try:
        capsule = dlpack.export(x, None if kind == CPU else LEGACY_STREAM)
        rule = "have a valid DLPack capsule"
        _, pointer, shape, strides, dtype, device, writable = dlpack.read(capsule)
        if kind == CPU and device[0] == CPU:
            claimed = device = HOST  # a library may count its own parts of it
        if device != claimed:
            raise dlpack.Malformed(f"one of {device_name(device)} beside a __dlpack_device__ of {device_name(claimed)}")
    except (dlpack.Malformed, Unaddressable) as error:
        raise BufferError(message(argument, rule, error, **facts(x))) from None
    except MemoryError:
        raise
    except Exception as error:
        raise BufferError(message(argument, rule, _said(error), **facts(x))) from error
    kept = capsule if kind == CPU else _kept_on(device[1], capsule)
    array = Array(pointer, shape, strides, dtype, device, writable, x, library, kept)
    if dtype not in dtypes:
        refuse_dtype(array, dtype, dtypes, argument, library.conversion)
    if pointer % ITEMSIZE[dtype]:
        refuse_misaligned(array, argument, f"address {pointer:#x}")
    return array


def _device(x: Any, argument: str) -> tuple[int, int]:
    """What x says of its device."""
    try:
        kind, index = x.__dlpack_device__()
        return operator.index(kind), operator.index(index)
    except Exception as error:
        rule = "have a __dlpack_device__ of two integers"
        raise TypeError(message(argument, rule, _said(error), **facts(x))) from error


def _said(error: Exception) -> str:
    return f"'{error}'" if str(error) else type(error).__name__


def new_output(
    shape: Shape, strides: Strides, dtype: str, device: tuple[int, int], library: Library
) -> tuple[Array, dlpack.Exporter]:
    """Memory of ours for an output of a library, and what it will take it over from."""
    if device[0] == CPU:
        buffer = _buffer(shape, strides, dtype)
        pointer, capsule_of = buffer.ctypes.data, None
    else:
        memory = _memory_of[device[0]]()
        buffer = memory.new_buffer(shape, in_bytes(strides, ITEMSIZE[dtype]), storage(dtype), device[1])
        pointer, capsule_of = buffer.data.ptr, memory.capsule_of
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
    strides = in_bytes(array.strides, ITEMSIZE[array.dtype])
    bits: np.ndarray[Any, Any] = _memory_of[array.device[0]]().host_copy(
        array.pointer, array.shape, strides, storage(array.dtype), array.device[1]
    )
    return bits
