"""Threads that run kernels without the GIL: safe under any number of caller threads, after fork, and whatever a signal
handler raises.

A *program* is the kernels of one launch and how many threads each is worth. One native call runs it, so that no
exception can leave it half done or while threads still use the caller's memory: Python raises what a signal handler
raises when the call is over.

A kernel claims tasks from an atomic counter until none is left, and the calling thread always takes part. So a kernel
ends even if no other thread is free, and no call waits for another caller's. Whose threads the others are,
`whose_threads.py` chooses: those of an OpenMP runtime that the process has loaded, or workers of this pool.

A runtime has a team for each calling thread. A few threads at a time are given one; others, which a server may have
hundreds of, share the workers.

Each worker has a mailbox, a word that says what it does: it is not there yet, asleep, idle (spinning), reserved, busy,
or the address of a job it has been given. Who changes a mailbox does so by compare-and-swap. A job given to a worker
that has not yet begun is withdrawn when the caller has run out of tasks. After a job a worker spins for a moment, so
that the next one of a series starts at once; then it sleeps on a semaphore.

Every thread computes in the default floating-point environment; the caller's own comes back with the call's end.
Kernels are called by address, so that no compiler moves their arithmetic out of it.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import itertools
import logging
import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Collection
from typing import NamedTuple

from cubn import _floating_point
from cubn._weak import WeakObjects
from cubn.backends.cores import cores
from cubn.backends.cpu import builtin, openmp, semaphore, whose_threads
from cubn.backends.cpu.compile import Kernel, compiled
from cubn.backends.cpu.openmp import Runtime
from cubn.backends.cpu.whose_threads import Choice
from cubn.backends.cpu.words import ABSENT, HEADER, MAILBOX, MAILBOXES, PLACES, RUNTIME, SAVE_MODE, WORD

logger = logging.getLogger("cubn")

MOST = 255  # workers
MOST_TEAMS = 4  # threads at a time that have one; each is as many threads as the runtime gives
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
        from cubn.backends.cpu.native_launch import ENTRIES

        return ENTRIES[name]

    return compiled(f"pool-{name}", build)


def compile_workers() -> None:
    """What threads run beside kernels, though none may be needed yet."""
    native("serve")
    native("spin")


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


class _Membership:
    """A thread's right to a team of the runtime's, as long as it is referred to: until the thread ends."""


class _Thread(threading.local):
    team: _Membership | None = None
    told: Runtime | None = None  # for which the thread has its number of threads
    in_team_by: Choice | None = None  # by which nothing is left to be asked or told


class Pool:
    """Workers, as many as were ever asked for and could be started; one mailbox each, at a fixed place."""

    def __init__(self) -> None:
        memory = ctypes.create_string_buffer(HEADER + MAILBOX * (MOST + 1))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))  # workers look at it until the process ends
        self._address = -(-ctypes.addressof(memory) // MAILBOX) * MAILBOX
        modes = _floating_point.SAVE, _floating_point.SET, _floating_point.DEFAULT
        waits = semaphore.WAIT, semaphore.POST, semaphore.NAP, semaphore.A_NAP
        self._write(self._address + SAVE_MODE, *modes, *waits, *map(builtin.address, _C_API), id(None))
        self._begin(forked=False)

    def begin_in_child(self) -> None:
        """Begin anew: a forked child has none of its parent's threads."""
        self._write(self._address + RUNTIME, 0)  # before all else: a call that a signal handler interrupted to fork
        self._write(self._address + MAILBOXES, 0)
        ctypes.memset(self._address + HEADER, 0, MAILBOX * MOST)
        self._begin(forked=True)

    def _begin(self, forked: bool) -> None:
        self._forked = forked
        self._workers = 0
        self._numbers = itertools.count()  # of mailboxes
        self._free: list[int] = []  # mailboxes whose worker could not be started
        self._changing = threading.RLock()  # which a signal handler may take again
        self._chosen: Choice | None = None
        self._runtimes: dict[tuple[Runtime, bool], ctypes.Array[ctypes.c_int64]] = {}  # their words
        self._thread = _Thread()
        self._members: WeakObjects[_Membership] = WeakObjects()

    def prepare(self, program: Program) -> Callable[..., None]:
        """The program as a function of addresses of a workspace and of statistics, then integers, then floats."""
        if program.helpers and self._chosen is None:
            self.choose()
        lists = program.integers, program.floats, program.in_workspace, program.in_statistics, program.stages
        words = array("q", (self._address, program.detaches, *map(len, lists), *program.block))
        words.extend((*program.integers, *program.floats))
        for pairs in (program.in_workspace, program.in_statistics):
            words.extend(word for pair in pairs for word in pair)
        for stage in program.stages:
            words.extend((stage.kernel.address, _helpers(stage)))
        return builtin.function(_execute(), words.tobytes())

    def choose(self) -> Choice:
        """Look whose threads are to compute from now on."""
        with self._changing:
            chosen = whose_threads.choice(self._forked)
            if chosen.limited_by:
                self._write(self._address + RUNTIME, self._words_of(chosen.limited_by, bool(chosen.teams_of)))
            self._chosen = chosen
            return chosen

    def _words_of(self, runtime: Runtime, is_lent: bool) -> int:
        """Where native code finds it."""
        if (runtime, is_lent) not in self._runtimes:
            entry, location = 0, 0
            if is_lent:
                entry = native("gnu-team" if runtime.is_gnu else "llvm-team").address
                location = 0 if runtime.is_gnu else ctypes.addressof(openmp.LOCATION)
            parallel = runtime.parallel if is_lent else 0
            words = runtime.max_threads, runtime.thread_number, parallel, entry, location
            self._runtimes[runtime, is_lent] = (ctypes.c_int64 * len(words))(*words)
        return ctypes.addressof(self._runtimes[runtime, is_lent])

    def ask_for(self, helpers: int) -> bool:
        """Have so many threads beside the caller's, if that can be; whether they are a team of a runtime's."""
        chosen = self._chosen
        if chosen is None or (chosen.modules is not None and chosen.modules != len(sys.modules)):
            chosen = self.choose()
        runtime = chosen.limited_by
        if runtime is not None:
            thread = self._thread
            if thread.in_team_by is chosen:
                return True
            if thread.told is not runtime and openmp.tell_thread():
                thread.told = runtime
            if chosen.teams_of is not None and (thread.team or self._has_joined(thread)):
                if thread.told is runtime:
                    thread.in_team_by = chosen
                return True
        if self._workers < helpers:
            most = min(helpers, runtime.threads - 1) if runtime else helpers
            if self._workers < most:
                self._grow(most)
        return False

    def _has_joined(self, thread: _Thread) -> bool:
        """Whether the thread, which has no team, is given one; they are given out until there are enough."""
        team = _Membership()
        self._members.add(team)  # no longer than `team` is there, whatever a signal handler raises
        if len(self._members) > MOST_TEAMS:
            return False
        thread.team = team
        return True

    def _grow(self, size: int) -> None:
        """Start workers. Where the system has no more threads to give, there are fewer."""
        serve = native("serve").call
        with self._changing:
            while self._workers < size:
                mailbox = self._mailbox()
                if mailbox is None:
                    return
                try:
                    _thread.start_new_thread(serve, (mailbox, self._spins()))
                except RuntimeError as error:
                    self._free.append(mailbox)
                    _say_how_few(self._workers + 1, str(error))
                    return
                self._workers += 1

    def _spins(self) -> int:
        """Pauses that one more worker makes after a job: none where others need the core."""
        return 0 if self._workers + 1 >= cores() else int(whose_threads.spinning() / _pause())

    def _mailbox(self) -> int | None:
        """One that no other worker has, also where a signal handler takes one meanwhile."""
        with contextlib.suppress(IndexError):
            return self._free.pop()
        number = next(self._numbers)
        if number >= MOST:
            return None
        mailbox = self._address + HEADER + MAILBOX * number
        wakeup = semaphore.made(mailbox + MAILBOX - semaphore.SIZE)
        self._write(mailbox, ABSENT, 0, wakeup, self._address)
        return mailbox

    @staticmethod
    def _write(address: int, *words: int) -> None:
        (ctypes.c_int64 * len(words)).from_address(address)[:] = list(words)


@functools.cache
def _pause() -> float:
    """Seconds that a pause takes, of some hundred."""
    call, times, pauses = native("spin").call, [], 500
    for _ in range(3):
        begin = time.perf_counter()
        call(pauses, 0)
        times.append(time.perf_counter() - begin)
    return max(min(times) / pauses, 1e-10)


@functools.cache
def _say_how_few(threads: int, error: str) -> None:
    logger.warning("cubn: no more threads can be started (%s): computing on %d, with the same results", error, threads)


_pool = Pool()
prepare, ask_for, choose = _pool.prepare, _pool.ask_for, _pool.choose


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.begin_in_child)
