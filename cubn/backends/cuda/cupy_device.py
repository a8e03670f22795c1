"""The device that CuPy drives: memory, streams, compiled kernels. The only file that imports CuPy."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from cubn._types import ITEMSIZE
from cubn._weak import WeakValues
from cubn.backends.cuda import loading
from cubn.backends.cuda.arguments import Slot
from cubn.backends.cuda.capture import relaxed
from cubn.backends.cuda.compile import compiler
from cubn.backends.cuda.device import Stream
from cubn.backends.cuda.in_flight import InFlight
from cubn.backends.cuda.machine_code import MachineCode
from cubn.backends.cuda.plan import Launch, Limits
from cubn.backends.folder import examined
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


CAPTURE_IMPLICIT = 906
"""cudaErrorStreamCaptureImplicit, of which CuPy has no name."""


class _Pinned(np.ndarray[Any, Any]):
    """Memory of `staging`."""


class CupyStream:
    """See cubn.backends.cuda.device.Stream; and CuPy's own of the same handle, which it keeps."""

    __slots__ = ("__weakref__", "cupys", "handle")

    def __init__(self, handle: int, cupys: Any) -> None:
        self.handle = handle
        self.cupys = cupys


class CupyDevice:
    """See cubn.backends.cuda.device.Device.

    Work goes to the current stream of the library whose arrays it is for: PyTorch's or CuPy's own; for any other, whose
    capsules are ordered before it, the legacy default stream. Memory for PyTorch's arrays comes from its allocator, so
    that a CUDA graph which PyTorch captures owns it.
    """

    def __init__(self, index: int, library: str) -> None:
        self.index = index
        self.limits = limits_of(index)
        self._library = library
        self._is_cupys = library == "cupy"
        self._torch = sys.modules["torch"] if library == "torch" else None
        if self._torch is not None:
            self._no_bytes = self._torch.empty(0, dtype=self._torch.uint8, device=f"cuda:{index}")
            self._torchs_stream = _torchs_stream(self._torch)
        self._device = cupy.cuda.Device(index)
        self._context_now, self._launch = cupy.cuda.driver.ctxGetCurrent, cupy.cuda.driver.launchKernel
        self._context = _context(index)
        self._code = machine_code(self.limits.capability)
        self._functions = functions_of(index)
        self._slots: list[Slot] = []  # which no launch is using
        self._in_flight = _IN_FLIGHT.setdefault(index, InFlight(_new_event))
        self._last = self._null = null_stream(index)

    # --- streams ------------------------------------------------------------------------------------------------------

    def stream(self) -> CupyStream:
        if self._torch is not None:
            cupys, handle = None, self._torchs_stream(self.index)
        elif self._is_cupys:
            cupys = cupy.cuda.get_current_stream(self.index)
            handle = cupys.ptr
        else:
            return self._null
        last = self._last  # by far the most likely one
        if last.handle != handle:
            self._last = last = stream_of(handle, self.index, cupys)
        return last

    def capturing(self) -> bool:
        return self._is_captured(self.stream())

    def _is_captured(self, stream: CupyStream) -> bool:
        with self._as_current():
            try:
                return bool(stream.cupys.is_capturing())
            except cupy.cuda.runtime.CUDARuntimeError as error:
                if error.status != CAPTURE_IMPLICIT:
                    raise
                return True  # the legacy default stream, where one is that it waits for

    def wait_for(self, other: Stream) -> None:
        stream = self.stream()
        if other is stream or self._is_captured(stream) or self._is_captured(other):  # type: ignore[arg-type]
            return
        with self._as_current():
            self._in_flight.order(other.cupys, stream.cupys)  # type: ignore[attr-defined]

    def hold(self, *memory: object) -> None:
        self._hold(self.stream(), memory)

    def _hold(self, stream: CupyStream, memory: tuple[object, ...]) -> None:
        if self._is_captured(stream):
            self._in_flight.hold_for_good(memory)
        else:
            with self._as_current(), relaxed():
                self._in_flight.hold(stream.cupys, memory)

    def synchronize(self) -> None:
        with self._as_current():
            self.stream().cupys.synchronize()

    @contextmanager
    def current(self) -> Iterator[int]:
        with self._as_current():
            yield self.stream().handle

    @contextmanager
    def _as_current(self) -> Iterator[None]:
        """With the device as the current one. A new thread has no context, which the driver's own functions need."""
        if self._context_now() == self._context:
            yield
            return
        with self._device:
            if self._context_now() != self._context:
                cupy.cuda.runtime.memGetInfo()  # as CuPy makes one
            yield

    # --- memory -------------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        if self._torch is not None:
            size = math.prod(shape) * ITEMSIZE[dtype]
            memory = self._no_bytes.new_empty(size)
            held = cupy.cuda.UnownedMemory(memory.data_ptr(), size, memory, self.index)
            return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(held, 0))
        if not self._is_cupys:
            with self._device, self._null.cupys:
                return cupy.ndarray(shape, dtype)
        if self._context_now() == self._context:
            return cupy.ndarray(shape, dtype)
        with self._device:
            return cupy.ndarray(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        array = self.empty(shape, dtype)
        with self._as_current():
            array.data.memset_async(0, array.nbytes, self.stream().cupys)
        return array

    def from_host(self, values: Any) -> Any:
        """By way of pinned memory, which alone is read when the stream gets there, and in a graph."""
        source = np.asanyarray(values)
        if not (isinstance(source, _Pinned) and source.flags.c_contiguous):
            source = self.staging(source.shape, source.dtype.name)
            source[...] = values
        array = self.empty(source.shape, source.dtype.name)
        stream = self.stream()
        copy, kind = cupy.cuda.runtime.memcpyAsync, cupy.cuda.runtime.memcpyHostToDevice
        with self._as_current():  # CuPy's own copies refuse a stream that is captured
            copy(array.data.ptr, source.ctypes.data, source.nbytes, kind, stream.handle)
        self._hold(stream, (source,))
        return array

    def to_host(self, array: Any, out: Any = None) -> Any:
        return array.get(stream=self.stream().cupys, out=out)

    def staging(self, shape: tuple[int, ...], dtype: str) -> Any:
        """From CuPy's pool of pinned memory, which takes it back."""
        with relaxed():
            memory = cupy.cuda.alloc_pinned_memory(math.prod(shape) * ITEMSIZE[dtype] or 1)
        return _Pinned(shape, dtype, memory)

    def beside(self, tables: Sequence[Any]) -> Any:
        rows, item = len(tables[0]), tables[0].dtype.itemsize
        ends = list(accumulate(table.shape[1] for table in tables))
        joined = self.empty((rows, ends[-1]), tables[0].dtype.name)
        kind, stream = cupy.cuda.runtime.memcpyDeviceToDevice, self.stream().handle
        with self._as_current():
            for table, end in zip(tables, ends, strict=True):
                width = item * table.shape[1]
                to = joined.data.ptr + item * end - width
                pitches = joined.strides[0], table.strides[0]
                cupy.cuda.runtime.memcpy2DAsync(to, pitches[0], table.data.ptr, pitches[1], width, rows, kind, stream)
        return joined

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def as_users(self, array: Any) -> Any:
        if self._torch is not None:
            return tensor_of(self._torch, array)
        if self._library != "jax":
            return array.view()
        from cubn._arrays import taken_over

        copy = self.empty(array.shape, array.dtype.name)
        kind = cupy.cuda.runtime.memcpyDeviceToDevice
        with self._as_current():
            cupy.cuda.runtime.memcpyAsync(copy.data.ptr, array.data.ptr, array.nbytes, kind, self._null.handle)
        return taken_over(copy, array.dtype.name, capsule_of)

    # --- kernels ------------------------------------------------------------------------------------------------------

    def compile(self, launches: Sequence[Launch]) -> None:
        missing = [launch for launch in launches if (launch.kernel, launch.options) not in self._functions]
        self._code.make_ready(missing)
        for launch in missing:
            self._loaded(launch)

    def launch(self, launch: Launch, parameters: bytearray, stream: Stream) -> None:
        if self._context_now() != self._context:
            with self._as_current():
                self.launch(launch, parameters, stream)
            return
        function = self._functions.get((launch.kernel, launch.options)) or self._loaded(launch)
        try:
            slot = self._slots.pop()
        except IndexError:
            slot = Slot(len(parameters))
        slot.bytes[:] = parameters
        threads, shared, arguments = launch.threads, launch.shared_bytes, slot.pointers
        self._launch(function.ptr, launch.grid, 1, 1, threads, 1, 1, shared, stream.handle, arguments, 0)
        self._slots.append(slot)  # the driver has read it

    def _loaded(self, launch: Launch) -> Any:
        """The kernel, compiled or from the cache."""
        code = self._code.of(launch)
        with self._as_current(), relaxed():  # for which device it is loaded
            function = loading.function(cupy.cuda, self._code, code, launch.kernel, self.limits.shared_bytes)
        self._functions[launch.kernel, launch.options] = function
        return function


# --- streams and what they still use ----------------------------------------------------------------------------------


class _Foreign(NamedTuple):
    """A stream of another library, as CUDA's stream protocol has it."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


_STREAMS: WeakValues[tuple[int, int], CupyStream] = WeakValues()


def stream_of(handle: int, index: int, cupys: Any = None) -> CupyStream:
    """The one object for a stream of a device. It keeps a stream of CuPy's, whose handle is no other's meanwhile."""
    found = _STREAMS.get((index, handle))
    if found is None:
        found = _STREAMS[index, handle] = CupyStream(handle, _foreign_stream(handle, index) if cupys is None else cupys)
    return found


def _foreign_stream(handle: int, index: int) -> Any:
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 and newer
        return cupy.cuda.Stream.from_external(_Foreign(handle))
    return cupy.cuda.ExternalStream(handle, index)


@functools.cache
def null_stream(index: int) -> CupyStream:
    """The legacy default stream of a device."""
    return stream_of(0, index, cupy.cuda.Stream.null)


def _torchs_stream(torch: Any) -> Callable[[int], int]:
    """The handle of PyTorch's current stream on a device."""
    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # as compiled code asks it
    return raw or (lambda index: int(torch.cuda.current_stream(index).cuda_stream))


def _new_event() -> Any:
    return cupy.cuda.Event(disable_timing=True)


_IN_FLIGHT: dict[int, InFlight] = {}
"""What work on each device still uses, whichever library it is for."""


@functools.cache
def _context(index: int) -> int:
    """CUDA's context of a device."""
    with cupy.cuda.Device(index):
        cupy.cuda.runtime.memGetInfo()  # makes one
        return int(cupy.cuda.driver.ctxGetCurrent())


def hold(things: tuple[object, ...], index: int) -> None:
    """Keep things until the legacy default stream has done what it has so far, if it has ever had anything."""
    if index in _IN_FLIGHT:
        with cupy.cuda.Device(index), relaxed():
            _IN_FLIGHT[index].hold(cupy.cuda.Stream.null, things)


def tensor_of(torch: Any, array: Any) -> Any:
    """A tensor in the storage of an array of `empty`: PyTorch's own, so that its graphs know whose memory it is."""
    storage = array.data.mem._owner.untyped_storage()
    steps = [step // array.itemsize for step in array.strides]
    first = (array.data.ptr - storage.data_ptr()) // array.itemsize
    tensor = torch.empty(0, dtype=getattr(torch, array.dtype.name), device=storage.device)
    return tensor.set_(storage, first, array.shape, steps)


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
    code = machine_code((major, minor))
    attributes = device.attributes
    limits = Limits(
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        (major, minor),
        attributes["L2CacheSize"],
    )
    if len(limits.clusters) > 1:
        with device:
            limits = replace(limits, cluster=loading.largest_cluster(cupy.cuda, code, limits.shared_bytes))
    return limits


@functools.cache
def functions_of(index: int) -> dict[tuple[str, tuple[str, ...]], Any]:
    """The kernels that a device has loaded, by name and options."""
    return {}


@functools.cache
def machine_code(capability: tuple[int, int]) -> MachineCode:
    """Kernels for devices of a compute capability, which need not be here; BackendUnavailable without a compiler."""
    return MachineCode(compiler(cupy.cuda.nvrtc, capability))


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


def host_copy(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, index: int) -> Any:
    """A copy in NumPy of an array of a library whose work is ordered before the legacy default stream."""
    if 0 in shape:
        return np.empty(shape, dtype)
    low, high = byte_bounds(shape, strides, np.dtype(dtype).itemsize)
    memory = np.empty(high - low, np.uint8)  # with what is between the elements: CuPy would compile a kernel
    with cupy.cuda.Device(index):
        kind, null = cupy.cuda.runtime.memcpyDeviceToHost, cupy.cuda.Stream.null
        cupy.cuda.runtime.memcpyAsync(memory.ctypes.data, pointer + low, memory.nbytes, kind, null.ptr)
        null.synchronize()
    return np.array(np.ndarray(shape, dtype, memory, -low, strides))


def settings() -> dict[str, str]:
    """What `python -m cubn info` says of the devices."""
    found: dict[str, str] = {}
    for index in range(cupy.cuda.runtime.getDeviceCount()):
        name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        try:
            limits = limits_of(index)
        except BackendUnavailable as error:
            found[f"device {index}"] = f"{name}, not used: {error}"
            continue
        found[f"device {index}"] = (
            f"{name}, compute capability {limits.capability[0]}.{limits.capability[1]}, "
            f"{limits.multiprocessors} multiprocessors, {limits.shared_bytes >> 10} KB shared memory a block, "
            f"clusters of up to {limits.clusters[-1]} blocks"
        )
        code = machine_code(limits.capability)
        found[f"compiler of device {index}"] = f"{code.compiler}, for sm_{code.compiler.architecture}"
        found[f"kernels of device {index}"] = examined(code.key)
    return found
