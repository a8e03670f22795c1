"""The simulated machine: devices, contexts, streams and events. Work is a function, done when its stream gets there.

What is given to a stream is done at once, or, while `lazy`, only when somebody waits for it: on a device anything may
come that late.
"""

import contextlib
import itertools
import os
import threading
from collections import deque

LEGACY, PER_THREAD = 1, 2  # CUDA's handles for them; 0 is the first, too
RELAXED = 2  # a mode of capture

SUCCESS, INVALID_HANDLE, NOT_READY, CAPTURE_UNSUPPORTED, CAPTURE_IMPLICIT = 0, 400, 600, 900, 906

lock = threading.RLock()
lazy = False
thread = threading.local()
_handles = itertools.count(0x50000000, 16)
_free_handles = []  # a new stream gets the handle of one that was destroyed


class CUDARuntimeError(RuntimeError):
    """As of cupy.cuda.runtime."""

    def __init__(self, status, what=""):
        super().__init__(f"CUDA error {status} {what}".strip())
        self.status = status


@contextlib.contextmanager
def lazily():
    """Work is done no sooner than somebody waits for it; all of it at the end."""
    global lazy
    lazy = True
    try:
        yield
    finally:
        lazy = False
        synchronize()


class Queue:
    """A stream."""

    def __init__(self, device, blocking=True, is_legacy=False):
        self.device, self.blocking, self.is_legacy = device, blocking, is_legacy
        self.waiting = deque()
        self.given = self.done = 0
        self.captured = None  # work, while it is captured
        self.mode = 0

    def give(self, work):
        with lock:
            if self.captured is not None:
                self.captured.append(work)
                return
            for other, position in self._implied():
                self.waiting.append(lambda other=other, position=position: other.reach(position))
                self.given += 1
            self.waiting.append(work)
            self.given += 1
            if not lazy:
                self.reach(self.given)

    def _implied(self):
        """The legacy default stream comes behind all blocking ones, and they behind it."""
        if self.is_legacy:
            for other in queues.values():
                if other.blocking and other.device == self.device and other is not self:
                    if other.captured is not None:
                        raise CUDARuntimeError(CAPTURE_IMPLICIT, "the legacy stream depends on one that is captured")
                    yield other, other.given
        elif self.blocking:
            yield legacy[self.device], legacy[self.device].given

    def reach(self, position):
        with lock:
            while self.done < position:
                work = self.waiting.popleft()
                self.done += 1
                work()


legacy = []  # of each device
queues = {}  # by handle, but for those that every device has
_destroyed = []


def become(devices):
    """A machine of so many devices."""
    legacy[:] = [Queue(device, is_legacy=True) for device in range(devices)]


become(int(os.environ.get("STAND_IN_DEVICES", "1")))


def queue(handle):
    """The stream of a handle, on the current device if it is one that every device has."""
    if handle in (0, LEGACY, PER_THREAD):
        return legacy[device()]
    try:
        return queues[handle]
    except KeyError:
        raise CUDARuntimeError(INVALID_HANDLE, f"no stream {handle:#x}") from None


def create(blocking):
    with lock:
        bind()
        handle = _free_handles.pop() if _free_handles else next(_handles)
        queues[handle] = Queue(device(), blocking)
        return handle


def destroy(handle):
    with lock:
        _destroyed.append(queues.pop(handle))
        _free_handles.append(handle)


def synchronize(index=None):
    """Everything on a device, or on all of them."""
    with lock:
        for found in (*legacy, *queues.values(), *_destroyed):
            if index is None or found.device == index:
                refuse_capture(found)
                found.reach(found.given)
        _destroyed.clear()


def refuse_capture(found):
    if found.captured is not None:
        raise CUDARuntimeError(CAPTURE_UNSUPPORTED, "waiting for a stream that is captured")


def refuse_unsafe(what):
    """What no thread may do while a stream is captured in the mode "global", unless its own mode is relaxed."""
    is_captured = any(found.captured is not None and found.mode == 0 for found in list(queues.values()))
    if is_captured and getattr(thread, "capture_mode", 0) != RELAXED:
        raise CUDARuntimeError(CAPTURE_UNSUPPORTED, f"{what} while a stream is captured, mode global")


class Libcuda:
    """The driver's own library, as far as CuPy does not have it."""

    @staticmethod
    def cuThreadExchangeStreamCaptureMode(mode):
        value = mode._obj
        before, thread.capture_mode = getattr(thread, "capture_mode", 0), value.value
        value.value = before
        return 0


class Event:
    """A place in a stream."""

    def __init__(self):
        self.queue, self.position, self.is_captured = None, 0, False

    def record(self, found):
        with lock:
            self.queue, self.position, self.is_captured = found, found.given, found.captured is not None

    def query(self):
        refuse_unsafe("an event was queried")
        if self.is_captured:
            return CAPTURE_UNSUPPORTED
        with lock:  # which whoever is about to do the work has
            return SUCCESS if self.queue is None or self.queue.done >= self.position else NOT_READY

    def synchronize(self):
        if self.is_captured:
            raise CUDARuntimeError(CAPTURE_UNSUPPORTED, "waiting for an event that was captured")
        if self.queue is not None:
            self.queue.reach(self.position)

    def holds_back(self, found):
        """What comes after, on a stream."""
        if self.queue is None:
            return
        if self.is_captured != (found.captured is not None):
            raise CUDARuntimeError(CAPTURE_UNSUPPORTED, "a captured event, or stream, and one that is not")
        if not self.is_captured:
            other, position = self.queue, self.position
            found.give(lambda: other.reach(position))


# --- devices and contexts ---------------------------------------------------------------------------------------------


def device():
    return getattr(thread, "device", 0)


def set_device(index):
    if not 0 <= index < len(legacy):
        raise CUDARuntimeError(101, f"no device {index}")
    thread.device = index
    bind()


def bind():
    """Make the current device's context the thread's, as most functions of the runtime do."""
    thread.context = context_of(device())


def context():
    return getattr(thread, "context", 0)  # none, in a new thread


def context_of(index):
    return 0xC0000000 + index
