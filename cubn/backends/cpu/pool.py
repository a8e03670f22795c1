"""A pool of threads that run kernels without the GIL: safe under any number of caller threads, after fork, and whatever
a signal handler raises.

A *program* is the kernels of one launch and how many threads each is worth. One native call runs it, so that no
exception can leave it half done or while threads still use the caller's memory: Python raises what a signal handler
raises when the call is over.

A kernel claims tasks from an atomic counter until none is left, and the calling thread always takes part. So a kernel
ends even if no worker is free, and no call waits for another caller's. Between kernels a worker spins for a moment, so
that the next one of a series starts at once; then it sleeps on a semaphore.

Each worker has a box, a word that says what it does: it is not there yet, asleep, idle (spinning), reserved, busy, or
the address of a job it has been given. Who changes a box does so by compare-and-swap. A job given to a worker that has
not yet begun is taken back when the caller has run out of tasks.

Every thread computes in the default floating-point environment; the caller's own comes back with the call's end.
Kernels are called by address, so that no compiler moves their arithmetic out of it.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import logging
import os
import platform
import threading
from array import array
from collections.abc import Callable, Iterable
from typing import NamedTuple

from cubn import _floating_point
from cubn.backends.cpu import semaphore
from cubn.backends.cpu.compile import Kernel, compiled
from cubn.backends.threads import cores

logger = logging.getLogger("cubn")

ABSENT, ASLEEP, IDLE, RESERVED, BUSY = range(5)  # anything greater is the address of a job
BOX = 128  # bytes: a cache line each, and its neighbour that is fetched along
STATE, NUMBER, SEMAPHORE, POOL = (8 * i for i in range(4))  # of a box; its memory for the semaphore is the second line
BOXES, SAVE, SET, DEFAULT, WAIT, POST, NAP, A_NAP = (8 * i for i in range(8))  # of the pool, BOX bytes before the boxes
KERNEL, PARAMETERS, DONE, CALLERS = (8 * i for i in range(4))  # of a job; then the caller's floating-point environment
STAGES, FIRST_STAGE, STAGE = 8, 16, 16  # of a program: the pool, how many stages; of each its kernel and helpers
SPINS = 30_000  # pauses of some 15-50 ns: longer than an operation's work between two kernels
MOST = 255  # workers


def build(name: str) -> Callable[[int, int], None]:
    """The native parts `serve` and `conduct`, in the language of kernels."""
    from llvmlite import ir

    from cubn.backends.cpu.nodes import jit
    from cubn.backends.cpu.simd import I64, Value, get, instruction, pointer, put

    @instruction(I64)
    def look(address: Value) -> Value:
        b = address.b
        return Value(b, b.load_atomic(pointer(address, I64), "acquire", 8, typ=I64))

    @instruction()
    def post(address: Value, value: Value) -> None:
        address.b.store_atomic(value.v, pointer(address, I64), "release", 8)

    @instruction(I64)
    def swap(address: Value, before: Value, after: Value) -> Value:
        """Compare and swap; 1 if it happened."""
        b = address.b
        pair = b.cmpxchg(pointer(address, I64), before.v, after.v, "acq_rel", "monotonic")
        return Value(b, b.zext(b.extract_value(pair, 1), I64))

    @instruction()
    def add_one(address: Value) -> None:
        address.b.atomic_rmw("add", pointer(address, I64), I64(1), "release")

    @instruction()
    def call(function: Value, first: Value, second: Value, third: Value) -> None:
        """A function of up to three integers or addresses, by its own address."""
        b, kind = function.b, ir.FunctionType(ir.VoidType(), [I64] * 3)
        b.call(b.inttoptr(function.v, ir.PointerType(kind)), [first.v, second.v, third.v])

    size = CALLERS + _floating_point.ROOM

    @instruction(I64)
    def new_job(anything: Value) -> Value:
        """On the stack, until the function returns."""
        b = anything.b
        with b.goto_entry_block():
            room = b.alloca(ir.ArrayType(I64, size // 8))
            room.align = 16
        return Value(b, b.ptrtoint(room, I64))

    waits = platform.machine() in ("x86_64", "AMD64")

    @instruction()
    def pause(anything: Value) -> None:
        if waits:
            b = anything.b
            name, kind = "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])
            b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), [])

    def serve(box, spins):  # type: ignore[no-untyped-def]
        """For ever do what is put in the box, asleep where nothing has come for a while."""
        pool, waited = get(box + POOL), 0
        call(get(pool + SET), get(pool + DEFAULT), 0, 0)
        post(box, IDLE)
        while True:
            state = look(box)
            if state > BUSY:
                if swap(box, state, BUSY):
                    call(get(state + KERNEL), get(state + PARAMETERS), get(box + NUMBER), 0)
                    post(box, IDLE)
                    add_one(state + DONE)
                waited = 0
            else:
                pause(box)
                waited += 1
                if waited > spins and swap(box, IDLE, ASLEEP):
                    while look(box) == ASLEEP:
                        call(get(pool + WAIT), get(box + SEMAPHORE), -1, 0)
                    waited = 0

    @jit
    def give(pool, job, places):  # type: ignore[no-untyped-def]
        """Put the job in the boxes of workers that have none, and wake those asleep; returns how many."""
        given = 0
        for worker in range(get(pool + BOXES)):
            if given == places:
                break
            box = pool + BOX * (worker + 1)
            state = look(box)
            if ASLEEP <= state <= IDLE and swap(box, state, RESERVED):
                given += 1
                put(box + NUMBER, given)
                post(box, job)
                if state == ASLEEP:
                    call(get(pool + POST), get(box + SEMAPHORE), 1, 0)
        return given

    @jit
    def take_back(pool, job):  # type: ignore[no-untyped-def]
        """Where it was not begun; returns how often."""
        taken = 0
        for worker in range(get(pool + BOXES)):
            box = pool + BOX * (worker + 1)
            if look(box) == job:
                taken += swap(box, job, IDLE)
        return taken

    def conduct(program, parameters):  # type: ignore[no-untyped-def]
        """Run a program: each kernel as worker 0 here and as up to so many others elsewhere."""
        pool, job = get(program), new_job(program)
        call(get(pool + SAVE), job + CALLERS, 0, 0)
        call(get(pool + SET), get(pool + DEFAULT), 0, 0)
        put(job + PARAMETERS, parameters)
        for i in range(get(program + STAGES)):
            stage = program + FIRST_STAGE + STAGE * i
            kernel, helpers = get(stage), get(stage + 8)
            put(job + KERNEL, kernel)
            put(job + DONE, 0)
            given = give(pool, job, helpers) if helpers else 0
            call(kernel, parameters, 0, 0)
            if given:
                given -= take_back(pool, job)
            waited = 0
            while look(job + DONE) != given:
                if waited < SPINS:
                    pause(job)
                    waited += 1
                else:
                    call(get(pool + NAP), get(pool + A_NAP), 0, 0)
        call(get(pool + SET), job + CALLERS, 0, 0)

    return {"serve": serve, "conduct": conduct}[name]


@functools.cache
def native(name: str) -> Kernel:
    return compiled(f"pool-{name}", lambda: build(name))


class Program(NamedTuple):
    """What `conduct` is told, and how many workers it can use."""

    words: array[int]
    address: int
    helpers: int


class Pool:
    """Workers, as many as were ever asked for and could be started; one box each, at a fixed place."""

    def __init__(self) -> None:
        memory = ctypes.create_string_buffer(BOX * (MOST + 2))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))  # workers look at it until the process ends
        self._address = -(-ctypes.addressof(memory) // BOX) * BOX
        self.forget_workers()

    def forget_workers(self) -> None:
        """Begin anew: a forked child has none of its parent's threads."""
        modes = _floating_point.SAVE, _floating_point.SET, _floating_point.DEFAULT
        waits = semaphore.WAIT, semaphore.POST, semaphore.NAP, semaphore.A_NAP
        ctypes.memset(self._address, 0, BOX * (MOST + 1))
        self._write(self._address, 0, *modes, *waits)
        self._boxes = self._workers = 0
        self._free: list[int] = []  # boxes
        self._growing = threading.RLock()  # which a signal handler may take again

    def program(self, kernels: Iterable[tuple[Kernel, int]]) -> Program:
        """Kernels one after the other, and how many threads each is worth."""
        stages = [(kernel.address, min(threads - 1, MOST)) for kernel, threads in kernels]
        words = array("q", (self._address, len(stages), *(word for stage in stages for word in stage)))
        return Program(words, words.buffer_info()[0], max(helpers for _, helpers in stages))

    def run(self, program: Program, parameters: int) -> None:
        """Run each kernel(parameters, worker) for worker 0 .. until every task is claimed and done."""
        if self._workers < program.helpers:
            self._grow(program.helpers)
        native("conduct").call(program.address, parameters)

    def _grow(self, size: int) -> None:
        """Start workers. Where the system has no more threads to give, there are fewer."""
        serve = native("serve").call
        with self._growing:
            while self._workers < size and (self._free or self._boxes < MOST):
                box = self._free.pop() if self._free else self._new_box()
                try:
                    _thread.start_new_thread(serve, (box, SPINS if self._workers + 1 < cores() else 0))
                except RuntimeError as error:
                    self._free.append(box)
                    _say_how_few(self._workers + 1, str(error))
                    return
                self._workers += 1

    def _new_box(self) -> int:
        """One that no worker will find but the one that is told of it."""
        self._boxes += 1
        box = self._address + BOX * self._boxes
        self._write(box, ABSENT, 0, semaphore.made(box + BOX - semaphore.SIZE), self._address)
        self._write(self._address, self._boxes)
        return box

    @staticmethod
    def _write(address: int, *words: int) -> None:
        (ctypes.c_int64 * len(words)).from_address(address)[:] = list(words)


@functools.cache
def _say_how_few(threads: int, error: str) -> None:
    logger.warning("cubn: no more threads can be started (%s): computing on %d, with the same results", error, threads)


_pool = Pool()
program, run = _pool.program, _pool.run


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget_workers)
