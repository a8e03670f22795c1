"""cupy.cuda."""

import threading
import warnings

from cupy import _machine
from cupy._memory import (
    BaseMemory,
    Memory,
    MemoryPointer,
    MemoryPool,
    UnownedMemory,
    alloc,
    alloc_pinned_memory,
    set_allocator,
    using_allocator,
)
from cupy.cuda import driver, function, nvrtc, runtime

__all__ = [
    "BaseMemory",
    "Device",
    "Event",
    "ExternalStream",
    "Graph",
    "Memory",
    "MemoryPointer",
    "MemoryPool",
    "Stream",
    "UnownedMemory",
    "alloc",
    "alloc_pinned_memory",
    "driver",
    "function",
    "get_current_stream",
    "is_available",
    "nvrtc",
    "runtime",
    "set_allocator",
    "using_allocator",
]


def is_available():
    return True


class Device:
    def __init__(self, device=None):
        self.id = _machine.device() if device is None else int(device)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None

    def __enter__(self):
        _stack("devices").append(_machine.device())
        if self.id != _machine.device():
            _machine.set_device(self.id)
        return self

    def __exit__(self, *_):
        _machine.set_device(_stack("devices").pop())

    def use(self):
        _machine.set_device(self.id)
        return self

    def synchronize(self):
        _machine.synchronize(self.id)

    @property
    def compute_capability(self):
        return "90"

    @property
    def attributes(self):
        return dict(runtime.ATTRIBUTES)


_local = threading.local()


def _stack(name):
    return _local.__dict__.setdefault(name, [])


def _currents():
    return _local.__dict__.setdefault("current", [Stream.null] * len(_machine.legacy))


def get_current_stream(device_id=-1):
    return _currents()[_machine.device() if device_id == -1 else device_id]


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.ptr = runtime.eventCreateWithFlags(0)

    def __del__(self):
        runtime.eventDestroy(self.ptr)

    @property
    def done(self):
        return runtime.eventQuery(self.ptr) == 0

    def record(self, stream=None):
        runtime.eventRecord(self.ptr, (get_current_stream() if stream is None else stream).ptr)

    def synchronize(self):
        runtime.eventSynchronize(self.ptr)


class _BaseStream:
    def __init__(self, ptr, device_id):
        self.ptr, self.device_id = ptr, device_id

    def __eq__(self, other):
        return isinstance(other, _BaseStream) and self.ptr == other.ptr

    def __hash__(self):
        return self.ptr

    def _on(self):
        index = _machine.device()
        if self.device_id not in (-1, index):
            raise RuntimeError(f"the stream is of device {self.device_id}, and the current device is {index}")
        return index

    def __enter__(self):
        index = self._on()
        _stack("streams").append((index, _currents()[index]))
        _currents()[index] = self
        return self

    def __exit__(self, *_):
        index, before = _stack("streams").pop()
        _currents()[index] = before

    def use(self):
        _currents()[self._on()] = self
        return self

    def __cuda_stream__(self):
        return 0, self.ptr

    @property
    def done(self):
        return runtime.streamQuery(self.ptr) == 0

    def synchronize(self):
        runtime.streamSynchronize(self.ptr)

    def record(self, event=None):
        event = event or Event()
        runtime.eventRecord(event.ptr, self.ptr)
        return event

    def wait_event(self, event):
        runtime.streamWaitEvent(self.ptr, event.ptr)

    def begin_capture(self, mode=None):
        if self.ptr in (0, _machine.LEGACY):
            raise RuntimeError("cannot capture on the default (legacy) stream")
        runtime.streamBeginCapture(self.ptr, runtime.streamCaptureModeRelaxed if mode is None else mode)

    def end_capture(self):
        return Graph(runtime.streamEndCapture(self.ptr))

    def is_capturing(self):
        return runtime.streamIsCapturing(self.ptr)


class Stream(_BaseStream):
    null = None

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self._foreign = None
        if null:
            super().__init__(0, -1)
        else:
            super().__init__(runtime.streamCreateWithFlags(int(non_blocking)), _machine.device())

    def __del__(self):
        if self._foreign is None and self.ptr != 0:
            runtime.streamDestroy(self.ptr)

    @classmethod
    def from_external(cls, obj):
        version, ptr = obj.__cuda_stream__()
        if version != 0:
            raise TypeError(f"version {version}")
        stream = cls.__new__(cls)
        _BaseStream.__init__(stream, ptr, -1)
        stream._foreign = obj
        return stream


class ExternalStream(_BaseStream):
    def __init__(self, ptr, device_id=-1):
        warnings.warn(
            "ExternalStream is deprecated. Use Stream.from_external() instead to interoperate with external streams "
            "that implement the CUDA stream protocol.",
            DeprecationWarning,
            stacklevel=2,
        )
        super().__init__(ptr, device_id)


class Graph:
    """What was captured, in order."""

    def __init__(self, work):
        self._work = work

    def launch(self, stream=None):
        queue = _machine.queue((get_current_stream() if stream is None else stream).ptr)
        for work in self._work:
            queue.give(work)


Stream.null = Stream(null=True)
