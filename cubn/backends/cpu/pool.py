"""A pool of threads that run kernels without the GIL: safe under any number of caller threads, after fork, and whatever
a signal handler raises.

A *program* is the kernels of one launch and how many threads each is worth. One native call runs it, so that no
exception can leave it half done or while threads still use the caller's memory: Python raises what a signal handler
raises when the call is over.

A kernel claims tasks from an atomic counter until none is left, and the calling thread always takes part. So a kernel
ends even if no worker is free, and no call waits for another caller's. Between kernels a worker spins for a moment, so
that the next one of a series starts at once; then it sleeps on a semaphore.

Each worker has a mailbox, a word that says what it does: it is not there yet, asleep, idle (spinning), reserved, busy,
or the address of a job it has been given. Who changes a mailbox does so by compare-and-swap. A job given to a worker
that has not yet begun is withdrawn when the caller has run out of tasks.

Every thread computes in the default floating-point environment; the caller's own comes back with the call's end.
Kernels are called by address, so that no compiler moves their arithmetic out of it.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import logging
import os
import threading
from array import array
from collections.abc import Callable, Collection
from typing import NamedTuple

from cubn import _floating_point
from cubn.backends.cpu import builtin, semaphore
from cubn.backends.cpu.compile import Kernel, compiled
from cubn.backends.cpu.words import ABSENT, MAILBOX, PLACES, SPINS, WORD
from cubn.backends.threads import cores

logger = logging.getLogger("cubn")

MOST = 255  # workers
_C_API = (
    "PyLong_AsLongLong",
    "PyFloat_AsDouble",
    "PyErr_Occurred",
    "PyErr_BadArgument",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
    "Py_IncRef",
)


@functools.cache
def native(name: str) -> Kernel:
    def build() -> Callable[..., int | None]:
        from cubn.backends.cpu.native_pool import ENTRIES

        return ENTRIES[name]

    return compiled(f"pool-{name}", build)


@functools.cache
def _execute() -> builtin.Definition:
    return builtin.definition("execute", native("execute").address)


class Stage(NamedTuple):
    """A kernel, and how many threads it is worth."""

    kernel: Kernel
    threads: int


class Program(NamedTuple):
    """What `execute` runs, and on what; see words.py."""

    stages: Collection[Stage]
    block: Collection[int]
    integers: Collection[int]
    floats: Collection[int]
    in_workspace: Collection[tuple[int, int]]
    in_statistics: Collection[tuple[int, int]]
    detaches: bool

    @property
    def nbytes(self) -> int:
        pairs = len(self.in_workspace) + len(self.in_statistics) + len(self.stages)
        return PLACES + WORD * (len(self.integers) + len(self.floats) + 2 * pairs)

    @property
    def helpers(self) -> int:
        """How many workers it can use."""
        return max(_helpers(stage) for stage in self.stages)


def _helpers(stage: Stage) -> int:
    return min(stage.threads - 1, MOST)


class Pool:
    """Workers, as many as were ever asked for and could be started; one mailbox each, at a fixed place."""

    def __init__(self) -> None:
        memory = ctypes.create_string_buffer(MAILBOX * (MOST + 2))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))  # workers look at it until the process ends
        self._address = -(-ctypes.addressof(memory) // MAILBOX) * MAILBOX
        self.forget_workers()

    def forget_workers(self) -> None:
        """Begin anew: a forked child has none of its parent's threads."""
        modes = _floating_point.SAVE, _floating_point.SET, _floating_point.DEFAULT
        waits = semaphore.WAIT, semaphore.POST, semaphore.NAP, semaphore.A_NAP
        ctypes.memset(self._address, 0, MAILBOX * (MOST + 1))
        self._write(self._address, 0, *modes, *waits, *map(builtin.address, _C_API), id(None))
        self._mailboxes = self._workers = 0
        self._free: list[int] = []  # mailboxes
        self._growing = threading.RLock()  # which a signal handler may take again

    def prepare(self, program: Program) -> Callable[..., None]:
        """The program as a function of addresses of a workspace and of statistics, then integers, then floats."""
        lists = program.integers, program.floats, program.in_workspace, program.in_statistics, program.stages
        words = array("q", (self._address, program.detaches, *map(len, lists), *program.block))
        words.extend((*program.integers, *program.floats))
        for pairs in (program.in_workspace, program.in_statistics):
            words.extend(word for pair in pairs for word in pair)
        for stage in program.stages:
            words.extend((stage.kernel.address, _helpers(stage)))
        return builtin.function(_execute(), words.tobytes())

    def ask_for(self, helpers: int) -> None:
        """Have so many workers, if that can be."""
        if self._workers < helpers:
            self._grow(helpers)

    def _grow(self, size: int) -> None:
        """Start workers. Where the system has no more threads to give, there are fewer."""
        serve = native("serve").call
        with self._growing:
            while self._workers < size and (self._free or self._mailboxes < MOST):
                mailbox = self._free.pop() if self._free else self._new_mailbox()
                try:
                    _thread.start_new_thread(serve, (mailbox, SPINS if self._workers + 1 < cores() else 0))
                except RuntimeError as error:
                    self._free.append(mailbox)
                    _say_how_few(self._workers + 1, str(error))
                    return
                self._workers += 1

    def _new_mailbox(self) -> int:
        """One that no worker will find but the one that is told of it."""
        self._mailboxes += 1
        mailbox = self._address + MAILBOX * self._mailboxes
        wakeup = semaphore.made(mailbox + MAILBOX - semaphore.SIZE)
        self._write(mailbox, ABSENT, 0, wakeup, self._address)
        self._write(self._address, self._mailboxes)
        return mailbox

    @staticmethod
    def _write(address: int, *words: int) -> None:
        (ctypes.c_int64 * len(words)).from_address(address)[:] = list(words)


@functools.cache
def _say_how_few(threads: int, error: str) -> None:
    logger.warning("cubn: no more threads can be started (%s): computing on %d, with the same results", error, threads)


_pool = Pool()
prepare, ask_for = _pool.prepare, _pool.ask_for


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget_workers)
