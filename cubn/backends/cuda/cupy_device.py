"""The device that CuPy drives: memory, streams, compiled kernels. The only file that imports CuPy."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from cubn.backends.cuda.plan import Launch, Limits
from cubn.backends.cuda.source import translation_unit
from cubn.errors import BackendUnavailable

try:
    import cupy
except ImportError as error:
    raise ImportError(
        "cubn: arrays on CUDA devices need CuPy, which is not installed. Install it with: pip install cupy-cuda13x "
        "(or cupy-cuda12x, as the driver allows)"
    ) from error

OLDEST = (7, 5)
"""Compute capability of the oldest supported devices."""

DEFAULT_SHARED_BYTES = 48 << 10


class _Pinned(np.ndarray[Any, Any]):
    """Memory of `staging`."""


class CupyDevice:
    """See cubn.backends.cuda.device.Device.

    Work goes to the current stream of the library whose arrays it is for: PyTorch's or CuPy's own; for any other, whose
    capsules are ordered before it, the legacy default stream. Memory for PyTorch's arrays comes from its allocator, so
    that a CUDA graph which PyTorch captures owns it.
    """

    def __init__(self, index: int, library: str) -> None:
        self.index = index
        self._device = cupy.cuda.Device(index)
        self._torch = sys.modules["torch"] if library == "torch" else None
        self._torchs_device = self._torch and self._torch.device("cuda", index)
        self._is_cupys = library == "cupy"
        self.limits = limits_of(index)
        self._kernels: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._copying: list[tuple[Any, Any]] = []  # memory of `staging`, and when it is free again

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        if self._is_cupys:  # whose current stream it is for anyway
            with self._device:
                return cupy.empty(shape, dtype)
        if self._torch is None:
            with self._device, cupy.cuda.Stream.null:
                return cupy.empty(shape, dtype)
        size = byte_bounds(shape, None, np.dtype(dtype).itemsize)[1]
        memory = self._torch.empty(size, dtype=self._torch.uint8, device=self._torchs_device)
        return view(memory.data_ptr(), shape, None, dtype, memory, self.index)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        array = self.empty(shape, dtype)
        with self._device, self._stream() as stream:
            array.data.memset_async(0, array.nbytes, stream)
        return array

    def from_host(self, values: Any) -> Any:
        source = np.ascontiguousarray(values)
        array = self.empty(np.shape(values), source.dtype.name)
        with self._device, self._stream() as stream:
            array.set(source.reshape(array.shape), stream=stream)
            if isinstance(values, _Pinned):
                self._copying = [(copied, memory) for copied, memory in self._copying if not copied.done]
                self._copying.append((stream.record(), values))
        return array

    def to_host(self, array: Any, out: Any = None) -> Any:
        with self._device, self._stream() as stream:
            return array.get(stream=stream, out=out)

    def staging(self, shape: tuple[int, ...], dtype: str) -> Any:
        """From CuPy's pool of pinned memory, which takes it back."""
        memory = cupy.cuda.alloc_pinned_memory(byte_bounds(shape, None, np.dtype(dtype).itemsize)[1])
        return _Pinned(shape, dtype, memory)

    def beside(self, tables: Sequence[Any]) -> Any:
        rows, columns = len(tables[0]), [table.shape[1] for table in tables]
        joined = self.empty((rows, sum(columns)), tables[0].dtype.name)
        with self._device, self._stream():
            for table, end in zip(tables, accumulate(columns), strict=True):
                joined[:, end - table.shape[1] : end] = table
        return joined

    def synchronize(self) -> None:
        with self._device, self._stream() as stream:
            stream.synchronize()

    @contextmanager
    def current(self) -> Iterator[int]:
        with self._device:
            yield int(self._stream().ptr)

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def launch(self, launch: Launch, parameters: bytearray) -> None:
        argument = np.frombuffer(parameters, _by_value(len(parameters)))  # an array of one
        with self._device:
            kernel = self._kernels.get((launch.kernel, launch.options)) or self._compiled(launch)
            stream = self._stream()
            kernel((launch.grid,), (launch.threads,), (argument,), shared_mem=launch.shared_bytes, stream=stream)

    def _compiled(self, launch: Launch) -> Any:
        """The kernel, compiled or from CuPy's cache on disk; it must be the current device's."""
        options = ("-std=c++17", *launch.options)
        kernel = cupy.RawModule(code=translation_unit(launch.source), options=options).get_function(launch.kernel)
        if self.limits.shared_bytes > DEFAULT_SHARED_BYTES:  # a block has more only if its kernel was told
            kernel.max_dynamic_shared_size_bytes = self.limits.shared_bytes - kernel.shared_size_bytes
        self._kernels[launch.kernel, launch.options] = kernel
        return kernel

    def _stream(self) -> Any:
        if self._torch is not None:
            return _foreign_stream(self._torch.cuda.current_stream(self.index).cuda_stream, self.index)
        return cupy.cuda.get_current_stream(self.index) if self._is_cupys else cupy.cuda.Stream.null


class _Foreign(NamedTuple):
    """A stream of another library, as CUDA's stream protocol has it."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


@functools.lru_cache(256)
def _foreign_stream(address: int, index: int) -> Any:
    """CuPy's stream for one of another library, whose address is all there is to it: kept, for it costs some time."""
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 and newer
        return cupy.cuda.Stream.from_external(_Foreign(address))
    return cupy.cuda.ExternalStream(address, index)


@functools.cache
def _by_value(size: int) -> np.dtype[Any]:
    """What CuPy passes by value, if it is of one element: a struct of a size."""
    return np.dtype((np.void, size))


@functools.cache
def limits_of(index: int) -> Limits:
    """The limits of a device; BackendUnavailable if there is none that can be used."""
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailable(
            f"cubn: CuPy found no usable CUDA driver ({error}). Install NVIDIA's driver, or a CuPy for the CUDA "
            "version it supports: cupy-cuda12x or cupy-cuda13x"
        ) from error
    if index >= devices:
        raise BackendUnavailable(
            f"cubn: there is no CUDA device {index}; CuPy sees {devices}. Check CUDA_VISIBLE_DEVICES"
        )
    device = cupy.cuda.Device(index)
    major, minor = divmod(int(device.compute_capability), 10)
    if (major, minor) < OLDEST:
        raise BackendUnavailable(
            f"cubn: CUDA device {index} has compute capability {major}.{minor}; {OLDEST[0]}.{OLDEST[1]} or newer is "
            "needed. Move the arrays to the CPU"
        )
    attributes = device.attributes
    return Limits(
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        (major, minor),
        attributes["L2CacheSize"],
    )


def view(
    pointer: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any, owner: Any, index: int
) -> Any:
    """A CuPy array over somebody else's memory, which it keeps alive; strides in bytes, None for C-contiguous."""
    dtype = np.dtype(dtype)
    low, high = byte_bounds(shape, strides, dtype.itemsize)
    memory = cupy.cuda.UnownedMemory(pointer + low, high - low, owner, index)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, -low), strides)


def byte_bounds(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> tuple[int, int]:
    """The lowest byte an array uses and one past the highest, from its first element on; one byte at least."""
    if strides is None:
        return 0, max(math.prod(shape) * itemsize, 1)
    reach = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True) if extent]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + itemsize


def new_buffer(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, index: int) -> Any:
    """A CuPy array of its own memory, with these strides in bytes; the shape's elements fill it."""
    with cupy.cuda.Device(index), cupy.cuda.Stream.null:
        memory = cupy.cuda.alloc(byte_bounds(shape, None, np.dtype(dtype).itemsize)[1])
        return cupy.ndarray(shape, dtype, memory, strides)


def capsule_of(buffer: Any, **options: Any) -> Any:
    """The DLPack capsule of a buffer that was written on the legacy default stream, whichever is CuPy's current one."""
    with buffer.device, cupy.cuda.Stream.null:
        return buffer.__dlpack__(**options)


def host_copy(array: Any) -> Any:
    """A copy in NumPy of an array of a library whose work is ordered before the legacy default stream."""
    with array.device, cupy.cuda.Stream.null:
        return array.get()


def settings() -> dict[str, str]:
    """What `python -m cubn info` says of the devices."""
    found = {"kernel cache": os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache") + " (CuPy's)"}
    for index in range(cupy.cuda.runtime.getDeviceCount()):
        name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        limits = limits_of(index)
        found[f"device {index}"] = (
            f"{name}, compute capability {limits.capability[0]}.{limits.capability[1]}, "
            f"{limits.multiprocessors} multiprocessors, {limits.shared_bytes >> 10} KB shared memory a block"
        )
    return found
