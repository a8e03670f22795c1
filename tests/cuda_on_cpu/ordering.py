"""What of the work on several streams is ordered: vector clocks over all that a test's devices do.

Every stream has a clock: how far of each stream it has waited for, itself included. So has the host, whose clock goes
into whatever it puts on a stream. An operation comes behind another one if its clock has reached the other's number.
Two that touch the same memory, one of them writing, and come behind each other in neither order are a fault; so is
memory that goes back to its allocator, which hands it out again on the stream it was asked for on, while an operation
that touches it may still run.
"""

import ctypes
import struct
import threading
import weakref
from bisect import bisect_right, insort

import numpy as np

from cubn.backends.cuda.parameters import members

STATISTICS = ("count", "mean", "m2", "var", "invstd")
SUMS = ("first", "second")
NODES = ("node_count", "node_first", "node_second")
READ_NODES = ("from_count", "from_first", "from_second", "table", "merges")
COUNTERS = ("tracked", "skipped")
WRITTEN = ("y", *NODES, "new_mean", "new_var", *COUNTERS, "dgamma", "dbeta", "kept_gamma", "kept_beta")
"""By any kernel that has them."""


class CpuStream:
    """A stream: what is put there is done at once, and written down."""

    def __init__(self, name, handle=0):
        self.name = name
        self.handle = handle
        self.clock = {self: 0}
        self.captured = False

    def __repr__(self):
        return self.name


class Block:
    """Memory that was handed out. Views of it keep this object, whose end is the memory's release."""

    def __init__(self, address, shape, dtype):
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "typestr": np.dtype(dtype).str,
        }


class Memory:
    """An allocation: of cubn's, or an array of the user's that is watched. Its bytes stay to the end of the test."""

    def __init__(self, name, bytes_, birth):
        self.name = name
        self.bytes = bytes_
        self.low = bytes_.ctypes.data
        self.high = self.low + max(1, bytes_.nbytes)
        self.birth = birth  # a stream; None for memory of the host's
        self.accesses = []


class Access:
    """One operation's, of bytes from low to high."""

    __slots__ = ("high", "low", "member", "number", "operation", "stream", "writes")

    def __init__(self, stream, number, low, high, writes, operation, member):
        self.stream, self.number = stream, number
        self.low, self.high, self.writes = low, high, writes
        self.operation, self.member = operation, member

    def __str__(self):
        return f"{self.operation} {'writes' if self.writes else 'reads'} {self.member} on {self.stream}"


class Ordering:
    """Streams, memory and what was done, of all devices of a test."""

    def __init__(self):
        self.host = {}
        self.faults = []
        self.events = 0
        """Waits of a stream for another one."""
        self.copies = 0
        """From the host."""
        self.host_waits = 0
        self._memory = []  # by address
        self._lock = threading.RLock()
        self._held = []
        self._found = set()

    # --- what devices tell --------------------------------------------------------------------------------------------

    def operation(self, stream, what, reads=(), writes=()):
        """One operation on a stream, and the addresses that it reads and writes: to the end of their allocations."""
        with self._lock:
            clock = stream.clock
            _join(clock, self.host)
            clock[stream] += 1
            for writing, addresses in ((False, reads), (True, writes)):
                for address, name in addresses:
                    memory = self._at(address)
                    if memory is not None:
                        self._touch(memory, Access(stream, clock[stream], address, memory.high, writing, what, name))

    def wait(self, stream, other):
        """A stream waits for an event that is recorded on another one now."""
        with self._lock:
            self.events += 1
            _join(stream.clock, other.clock)

    def synchronize(self, *streams):
        """The host waits for streams."""
        with self._lock:
            self.host_waits += 1
            for stream in streams:
                _join(self.host, stream.clock)

    def allocate(self, shape, dtype, birth, name):
        """An array of memory that is nobody's yet."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        whole = np.full(max(size, 1) + 256, 0xFF, np.uint8)
        first = -whole.ctypes.data % 256
        memory = Memory(name, whole[first : first + max(size, 1)], birth)
        block = Block(memory.low, shape, dtype)
        with self._lock:
            insort(self._memory, memory, key=_low)
        array = np.asarray(block)
        weakref.finalize(block, self._release, memory).atexit = False
        return array

    def hold(self, *things):
        """Keep things for as long as anything may run: to the end of the test."""
        self._held += things

    # --- what a test tells --------------------------------------------------------------------------------------------

    def watch(self, name, array):
        """An array of the user's, which is kept."""
        with self._lock:
            low = array.ctypes.data
            raw = (ctypes.c_uint8 * max(1, array.nbytes)).from_address(low)
            insort(self._memory, Memory(name, np.frombuffer(raw, np.uint8), None), key=_low)
            self._held.append(array)
        return array

    def is_own(self, array):
        """Whether an array is in memory that was handed out here."""
        return self._at(array.ctypes.data) is not None

    def verify(self):
        assert not self.faults, "\n".join(self.faults)

    # --- the checks ---------------------------------------------------------------------------------------------------

    def _at(self, address):
        place = bisect_right(self._memory, address, key=_low)
        memory = self._memory[place - 1] if place else None
        return memory if memory is not None and memory.low <= address < memory.high else None

    def _touch(self, memory, access):
        clock, left = access.stream.clock, []
        for other in memory.accesses:
            ordered = clock.get(other.stream, 0) >= other.number
            overlap = other.low < access.high and access.low < other.high
            if overlap and not ordered and (access.writes or other.writes):
                self._find(memory, f"{access}, unordered with {other}", access, other)
            same = access.low <= other.low and other.high <= access.high
            if not (ordered and same and (access.writes or (other.stream is access.stream and not other.writes))):
                left.append(other)
        memory.accesses = [*left, access]

    def _release(self, memory):
        """Back to the allocator, which hands it out again on the stream it is from; to anybody, where it has none."""
        with self._lock:
            clock = dict(self.host)
            if memory.birth is not None:
                _join(clock, memory.birth.clock)
            for access in memory.accesses:
                if clock.get(access.stream, 0) < access.number:
                    where = f"to {memory.birth}" if memory.birth else "to the host"
                    self._find(memory, f"released {where} while {access}", access)

    def _find(self, memory, text, *accesses):
        """A fault; once for two operations and a piece of memory."""
        key = (memory, *((access.operation, access.stream) for access in accesses))
        if key not in self._found:
            self._found.add(key)
            self.faults.append(f"{memory.name}: {text}")


def accesses(launch, parameters):
    """Addresses that a launch reads and those that it writes, with the members of Parameters that have them."""
    words = struct.unpack(f"{len(parameters) // 8}q", parameters)
    reads, writes = [], []
    writing = _written(launch)
    for name, word in _pointers().items():
        if words[word]:
            (writes if name in writing else reads).append((words[word], name))
    return reads, writes


def _pointers():
    """Members of Parameters that are addresses, and in which of its words they are."""
    known = members()
    found = {name.removesuffix(".pointer"): word for name, (word, _) in known.items() if name.endswith(".pointer")}
    single = (*NODES, *READ_NODES, *STATISTICS, *SUMS, *COUNTERS, "kept_gamma", "kept_beta", "coefficients", "bits")
    return found | {name: known[name].word for name in single}


def _written(launch):
    """Which members a kernel writes, as far as that depends on what it is compiled for."""
    options, written = set(launch.options), set(WRITTEN)
    normalizes, differentiates = ("-DOPERATION=NORMALIZE" in options, "-DOPERATION=GRADIENT" in options)
    finishes = launch.kernel == "finish"
    if launch.kernel in ("statistics", "frozen") or (finishes and "-DKIND=Moments" in options) or normalizes:
        written |= set(STATISTICS)
    if launch.kernel == "root" or (finishes and "-DKIND=Sums" in options) or differentiates:
        written |= set(SUMS)
    if launch.kernel == "root":
        written.add("count")
    if normalizes:
        written.add("bits")
    if differentiates:
        written.add("r")
    if launch.file == "channelwise" or finishes:
        written.add("coefficients")
    return written


def _join(clock, other):
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number


def _low(memory):
    return memory if isinstance(memory, int) else memory.low
