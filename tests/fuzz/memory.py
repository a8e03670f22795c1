"""Arrays between guard pages: reading or writing beyond them ends the process, and their neighbours are watched."""

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np

UNTOUCHED = 0xA5
PAGE = mmap.PAGESIZE
NONE, READ, READ_AND_WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_munmap = _libc.munmap


class Pages:
    """Bytes in whole pages, with a page on either side that nobody may touch."""

    def __init__(self, size):
        self.size = max(1, -(-size // PAGE)) * PAGE
        self._whole = self.size + 2 * PAGE
        self._begin = _libc.mmap(None, self._whole, NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if self._begin in (None, ctypes.c_void_p(-1).value):
            self._begin = None
            raise MemoryError("no pages left")
        self.address = self._begin + PAGE
        self.protect(READ_AND_WRITE)
        self.__array_interface__ = {
            "version": 3,
            "data": (self.address, False),
            "shape": (self.size,),
            "typestr": "|u1",
        }

    def protect(self, access):
        if _libc.mprotect(self.address, self.size, access):
            raise OSError(ctypes.get_errno(), "mprotect")

    def __del__(self):
        if self._begin is not None:
            _munmap(self._begin, self._whole)


@dataclass(frozen=True)
class Memory:
    """How an array lies in its pages.

    `order` has the axes from the outermost to the innermost; along the innermost, elements are `step` apart, and `gaps`
    elements are left free behind each of the others. Along `backwards` axes strides are negative, along `repeated`
    ones 0. The array ends `offset` elements before the guard page behind it, or else begins as far behind the one
    before it.
    """

    order: tuple[int, ...]
    step: int = 1
    gaps: tuple[int, ...] = ()
    backwards: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    offset: int = 0
    at_end: bool = True

    def strides(self, shape):
        """In elements."""
        strides, step = [0] * len(shape), self.step
        gaps = self.gaps or (0,) * len(shape)
        for axis in reversed(self.order):
            if axis in self.repeated:
                continue
            strides[axis] = -step if axis in self.backwards else step
            step = step * max(shape[axis], 1) + gaps[axis]
        return tuple(strides)


def dense(rank):
    return Memory(tuple(range(rank)))


class Placed:
    """Values in memory of a kind: `array` sees them, as far as the memory can tell them apart."""

    def __init__(self, values, memory):
        item = values.itemsize
        strides = [s * item for s in memory.strides(values.shape)]
        reach = [s * (n - 1) for s, n in zip(strides, values.shape, strict=True)] if values.size else [0]
        before = -sum(r for r in reach if r < 0)
        size = before + sum(r for r in reach if r > 0) + (item if values.size else 0)
        self.pages = Pages(size + memory.offset * item)
        self.bytes = np.asarray(self.pages)
        self.bytes[...] = UNTOUCHED
        begin = (self.pages.size - size if memory.at_end else 0) + before
        begin += -memory.offset * item if memory.at_end else memory.offset * item
        self.array = np.ndarray(values.shape, values.dtype, self.bytes, begin, strides)
        self.array[...] = values

    def keep_from_writes(self):
        """Whoever writes to the array from now on is caught in the act."""
        self.pages.protect(READ)
        return self

    def check_neighbours(self, what):
        """Nothing but the elements was written to."""
        copy = self.array.copy()
        self.array[...] = np.frombuffer(bytes([UNTOUCHED]) * copy.itemsize, copy.dtype)
        wrong = np.flatnonzero(self.bytes != UNTOUCHED)
        self.array[...] = copy
        assert not wrong.size, f"memory beside {what} was written to, {wrong[0]} bytes behind the guard page"


def draw(rng, shape, library, *, repeat=(), gap=0.3):
    """A Memory for an array of this shape that the library can hold; `repeat`: axes that may have a stride of 0."""
    rank = len(shape)
    order = list(range(rank))
    if rng.random() < 0.6:
        rng.shuffle(order)
    if library == "jax":
        return dense(rank)
    spread = rng.random() < gap
    return Memory(
        tuple(order),
        step=rng.choice([1, 1, 2, 3]) if spread else 1,
        gaps=tuple(rng.choice([0, 0, 1, 5, 16]) if spread else 0 for _ in range(rank)),
        backwards=tuple(a for a in range(rank) if library != "torch" and spread and rng.random() < 0.3),
        repeated=tuple(a for a in repeat if rng.random() < 0.1),
        offset=rng.choice([0, 0, 0, 1, 3, 8, 21]),
        at_end=rng.random() < 0.7,
    )
