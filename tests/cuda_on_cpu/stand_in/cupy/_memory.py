"""Memory of the simulated devices, which is the host's, and pinned memory, with pools like CuPy's."""

import contextlib
import ctypes
import weakref

import numpy as np

from cupy import _machine

UNIT = 512


class BaseMemory:
    @property
    def device(self):
        from cupy.cuda import Device

        return Device(self.device_id)


class Memory(BaseMemory):
    """An allocation of the driver's, of bytes that no test expects."""

    def __init__(self, size):
        _machine.bind()
        self.size, self.device_id = size, _machine.device()
        self._bytes = np.full(size + UNIT, 0xFF, np.uint8)
        self.ptr = -(-self._bytes.ctypes.data // UNIT) * UNIT if size else 0


class UnownedMemory(BaseMemory):
    def __init__(self, ptr, size, owner, device_id=-1):
        self.ptr, self.size, self._owner = ptr, size, owner
        self.device_id = _machine.device() if device_id < 0 else device_id


class MemoryPointer:
    def __init__(self, mem, offset):
        assert mem.ptr != 0 or offset == 0
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    device = BaseMemory.device

    def __add__(self, offset):
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def memset_async(self, value, size, stream=None):
        if size:
            _queue(stream).give(lambda at=self.ptr, keep=self.mem: ctypes.memset(at, value, size))

    def copy_from_host_async(self, address, size, stream=None):
        self._refuse_capture(stream)
        _copy(self.ptr, address, size, _queue(stream))

    def copy_to_host_async(self, address, size, stream=None):
        self._refuse_capture(stream)
        _copy(address, self.ptr, size, _queue(stream))

    def _refuse_capture(self, stream):
        if _queue(stream).captured is not None:
            raise RuntimeError("the current stream is capturing, so H2D and D2H transfers are disallowed")


def _queue(stream):
    from cupy.cuda import get_current_stream

    return _machine.queue((get_current_stream() if stream is None else stream).ptr)


def _copy(to, source, size, queue):
    """The bytes that are there when the stream gets there."""
    if size:
        queue.give(lambda: ctypes.memmove(to, source, size))


class _Pooled(BaseMemory):
    def __init__(self, memory, arena):
        self.ptr, self.size, self.device_id = memory.ptr, memory.size, memory.device_id
        self._memory, self._arena = memory, arena

    def __del__(self):
        self._arena.setdefault(self.size, []).append(self._memory)


class MemoryPool:
    """Memory goes back to the arena of the stream that it was allocated on, at once, and comes from there again.

    What is in it then is overwritten in that stream's order.
    """

    def __init__(self, allocator=None):
        self._arenas = {}
        self.allocations = 0  # of the driver's

    def malloc(self, size):
        from cupy.cuda import get_current_stream

        if not size:
            return MemoryPointer(Memory(0), 0)
        stream = get_current_stream()
        arena = self._arenas.setdefault((_machine.device(), stream.ptr), {})
        size = -(-size // UNIT) * UNIT
        try:
            memory = arena[size].pop()
        except LookupError:
            memory = Memory(size)
            self.allocations += 1
        else:
            _machine.queue(stream.ptr).give(lambda: ctypes.memset(memory.ptr, 0xFF, size))
        return MemoryPointer(_Pooled(memory, arena), 0)

    def free_all_blocks(self, stream=None):
        self._arenas.clear()


_default_pool = MemoryPool()
_allocators = [_default_pool.malloc]


def get_default_memory_pool():
    return _default_pool


def alloc(size):
    return _allocators[-1](size)


def set_allocator(allocator=_default_pool.malloc):
    _allocators[0] = allocator or (lambda size: MemoryPointer(Memory(size), 0))


@contextlib.contextmanager
def using_allocator(allocator):
    _allocators.append(allocator)
    try:
        yield
    finally:
        _allocators.pop()


# --- pinned memory ----------------------------------------------------------------------------------------------------

_free_pinned = {}


def alloc_pinned_memory(size):
    """A buffer; when it goes, others get its memory, who write there at once."""
    size = max(UNIT, 1 << (size - 1).bit_length())
    try:
        memory = _free_pinned[size].pop()
    except LookupError:
        _machine.refuse_unsafe("pinned memory was allocated")
        memory = ctypes.create_string_buffer(size)
    buffer = (ctypes.c_char * size).from_buffer(memory)
    weakref.finalize(buffer, _give_back, memory, size).atexit = False
    return buffer


def _give_back(memory, size):
    ctypes.memset(memory, 0xEE, size)
    _free_pinned.setdefault(size, []).append(memory)
