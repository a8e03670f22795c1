"""cupy.cuda.runtime."""

import ctypes

from cupy import _machine
from cupy._machine import CUDARuntimeError as CUDARuntimeError

is_hip = False
memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = range(5)
streamLegacy, streamPerThread = _machine.LEGACY, _machine.PER_THREAD
streamDefault, streamNonBlocking = 0, 1
streamCaptureModeGlobal, streamCaptureModeThreadLocal, streamCaptureModeRelaxed = range(3)

ATTRIBUTES = {"MultiProcessorCount": 2, "MaxSharedMemoryPerBlockOptin": 48 << 10, "L2CacheSize": 0}
"""Of every device: plans for small arrays look as those for large ones do on a large device."""

_events = {}


def getDeviceCount():
    return len(_machine.legacy)


def getDevice():
    return _machine.device()


def setDevice(index):
    _machine.set_device(index)


def getDeviceProperties(index):
    return {"name": b"stand-in", "multiProcessorCount": ATTRIBUTES["MultiProcessorCount"], "major": 9, "minor": 0}


def deviceSynchronize():
    _machine.synchronize(_machine.device())


def memGetInfo():
    _machine.bind()
    return 1 << 40, 1 << 40


def runtimeGetVersion():
    return 13000


driverGetVersion = runtimeGetVersion


def memcpy(to, source, size, kind):
    _machine.synchronize()
    ctypes.memmove(to, source, size)


def memcpyAsync(to, source, size, kind, stream):
    if size:
        _machine.queue(stream).give(lambda: ctypes.memmove(to, source, size))


def memcpy2DAsync(to, to_pitch, source, source_pitch, width, height, kind, stream):
    def copy():
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, source + row * source_pitch, width)

    _machine.queue(stream).give(copy)


def memsetAsync(to, value, size, stream):
    if size:
        _machine.queue(stream).give(lambda: ctypes.memset(to, value, size))


# --- streams ----------------------------------------------------------------------------------------------------------


def streamCreateWithFlags(flags):
    return _machine.create(not flags & streamNonBlocking)


def streamDestroy(stream):
    _machine.destroy(stream)


def streamSynchronize(stream):
    queue = _machine.queue(stream)
    _machine.refuse_capture(queue)
    queue.give(lambda: None)
    queue.reach(queue.given)


def streamQuery(stream):
    queue = _machine.queue(stream)
    return _machine.SUCCESS if queue.done == queue.given else _machine.NOT_READY


def streamWaitEvent(stream, event, flags=0):
    _events[event].holds_back(_machine.queue(stream))


def streamIsCapturing(stream):
    queue = _machine.queue(stream)
    if queue.is_legacy and any(q.blocking and q.captured is not None for q in _machine.queues.values()):
        raise CUDARuntimeError(_machine.CAPTURE_IMPLICIT)
    return queue.captured is not None


def streamBeginCapture(stream, mode=streamCaptureModeRelaxed):
    queue = _machine.queue(stream)
    queue.captured, queue.mode = [], mode


def streamEndCapture(stream):
    queue = _machine.queue(stream)
    found, queue.captured = queue.captured, None
    return found


# --- events -----------------------------------------------------------------------------------------------------------


def eventCreateWithFlags(flags):
    found = _machine.Event()
    _events[id(found)] = found
    return id(found)


def eventDestroy(event):
    del _events[event]


def eventQuery(event):
    return _events[event].query()


def eventRecord(event, stream):
    _events[event].record(_machine.queue(stream))


def eventSynchronize(event):
    _events[event].synchronize()
