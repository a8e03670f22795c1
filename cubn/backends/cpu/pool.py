"""A pool of Python threads that run kernels without the GIL: safe under any number of caller threads, and after fork.

A kernel claims tasks from an atomic counter until none is left, and the calling thread always takes part. So a job ends
even if no worker is free, and no call waits for another caller's job. Between jobs a worker spins for a moment, in
native code, so that the next job of a series starts at once; then it sleeps on a lock.

Each worker has a box, a word that says what it does: asleep, idle (spinning), reserved, busy, or the address of a job
it has been given. Who changes a box does so by compare-and-swap. A job given to a worker that has not yet begun is
taken back when the caller has run out of tasks.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
import time
from array import array
from collections.abc import Callable

from cubn.backends.cpu.compile import Kernel, compiled
from cubn.backends.threads import cores

ASLEEP, IDLE, RESERVED, BUSY = range(4)  # anything greater is the address of a job
BOX = 128  # bytes: a cache line each, and its neighbour that is fetched along
KERNEL, PARAMETERS, PLACES, GIVEN, DONE, WOKEN, FIRST_WOKEN = (8 * i for i in range(7))  # a job
SPINS = 30_000  # pauses of some 15-50 ns: longer than an operation's work between two kernels
MOST = 255  # workers


def build(name: str) -> Callable[[int, int], None]:
    """The native parts `serve`, `give` and `join`, in the language of kernels."""
    from llvmlite import ir

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
    def run(kernel: Value, parameters: Value, worker: Value) -> None:
        b, kind = kernel.b, ir.FunctionType(ir.VoidType(), [I64, I64])
        b.call(b.inttoptr(kernel.v, ir.PointerType(kind)), [parameters.v, worker.v])

    waits = platform.machine() in ("x86_64", "AMD64")

    @instruction()
    def pause(anything: Value) -> None:
        if waits:
            b = anything.b
            name, kind = "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])
            b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), [])

    def serve(box, spins):  # type: ignore[no-untyped-def]
        """Do what is put in the box until nothing has come for a while, then fall asleep."""
        waited = 0
        while True:
            state = look(box)
            if state > BUSY:
                if swap(box, state, BUSY):
                    run(get(state + KERNEL), get(state + PARAMETERS), get(box + 8))
                    post(box, IDLE)
                    add_one(state + DONE)
                waited = 0
            else:
                pause(box)
                waited += 1
                if waited > spins and swap(box, IDLE, ASLEEP):
                    return

    def give(pool, job):  # type: ignore[no-untyped-def]
        """Put the job in the boxes of workers that have none; list those to be woken."""
        given, woken = 0, 0
        for worker in range(get(pool)):
            if given == get(job + PLACES):
                break
            box = pool + BOX * (worker + 1)
            state = look(box)
            if state <= IDLE and swap(box, state, RESERVED):
                given += 1
                put(box + 8, given)
                post(box, job)
                if state == ASLEEP:
                    put(job + FIRST_WOKEN + 8 * woken, worker)
                    woken += 1
        put(job + GIVEN, given)
        put(job + WOKEN, woken)

    def join(pool, job):  # type: ignore[no-untyped-def]
        """Take part, take the job back where it was not begun, and wait a while for the others."""
        run(get(job + KERNEL), get(job + PARAMETERS), 0)
        given = get(job + GIVEN)
        for worker in range(get(pool)):
            box = pool + BOX * (worker + 1)
            if look(box) == job and swap(box, job, IDLE):
                given -= 1
        put(job + GIVEN, given)
        waited = 0
        while look(job + DONE) != given and waited < SPINS:
            pause(job)
            waited += 1

    return {"serve": serve, "give": give, "join": join}[name]


@functools.cache
def native(name: str) -> Kernel:
    return compiled(f"pool-{name}", lambda: build(name))


class Pool:
    """Workers, as many as were ever asked for."""

    def __init__(self) -> None:
        memory = array("q", bytes(BOX * (MOST + 2)))
        start = memory.buffer_info()[0]
        self._memory, self._address = memory, -(-start // BOX) * BOX
        self._size_at = (self._address - start) // 8
        self._beds: list[threading.Lock] = []
        self._growing = threading.Lock()

    def run(self, kernel: Kernel, parameters: int, helpers: int) -> None:
        """Run the kernel as worker 0 here and as up to `helpers` others."""
        if len(self._beds) < helpers:
            self._grow(helpers)
        job = array("q", (kernel.address, parameters, helpers, 0, 0, 0, *[0] * helpers))
        address = job.buffer_info()[0]
        native("give").call(self._address, address)
        try:
            for i in range(job[WOKEN // 8]):
                self._beds[job[FIRST_WOKEN // 8 + i]].release()
        finally:  # an interrupt must not free what workers still use
            native("join").call(self._address, address)
            while job[DONE // 8] != job[GIVEN // 8]:
                time.sleep(2e-5)

    def _grow(self, size: int) -> None:
        serve = native("serve")
        with self._growing:
            for worker in range(len(self._beds), min(size, MOST)):
                bed = threading.Lock()
                bed.acquire()
                box = self._address + BOX * (worker + 1)
                spins = SPINS if worker + 1 < cores() else 0
                threading.Thread(target=_work, args=(serve, box, spins, bed), name="cubn", daemon=True).start()
                self._beds.append(bed)
                self._memory[self._size_at] = len(self._beds)


def _work(serve: Kernel, box: int, spins: int, bed: threading.Lock) -> None:
    while True:
        bed.acquire()
        serve.call(box, spins)


_pool = Pool()


def run(kernel: Kernel, parameters: int, threads: int) -> None:
    """Run `kernel(parameters, worker)` for worker 0 .. at most threads - 1 until every task is claimed and done."""
    if threads == 1:
        kernel.call(parameters, 0)
    else:
        _pool.run(kernel, parameters, threads - 1)


def _forget_workers() -> None:
    """A forked child has none of its parent's threads: start anew."""
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
