"""Kernels run by workers of the pool's own: native code."""

from __future__ import annotations

from cubn.backends.cpu.native import add_one, call, compare_exchange, load_acquire, pause, store_release
from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.simd import get, put
from cubn.backends.cpu.words import (
    A_NAP,
    ASLEEP,
    BUSY,
    DEFAULT_MODE,
    DONE,
    HEADER,
    IDLE,
    KERNEL,
    MAILBOX,
    MAILBOXES,
    NAP,
    NUMBER,
    PARAMETERS,
    POOL,
    POST,
    RESERVED,
    RUNTIME,
    SET_MODE,
    WAIT,
    WAITING,
    WAKEUP,
)


def serve(mailbox, spins):  # type: ignore[no-untyped-def]
    """For ever do what is put in the mailbox, asleep where nothing has come for a while: at once where a runtime's
    threads may need the core.
    """
    pool, waited = get(mailbox + POOL), 0
    call(get(pool + SET_MODE), get(pool + DEFAULT_MODE), 0)
    announce(pool, mailbox)
    store_release(mailbox, IDLE)
    while True:
        state = load_acquire(mailbox)
        if state > BUSY:
            if compare_exchange(mailbox, state, BUSY):
                call(get(state + KERNEL), get(state + PARAMETERS), get(mailbox + NUMBER))
                store_release(mailbox, IDLE)
                add_one(state + DONE)
            waited = 0
        else:
            pause(mailbox)
            waited += 1
            if (waited > spins or get(pool + RUNTIME)) and compare_exchange(mailbox, IDLE, ASLEEP):
                while load_acquire(mailbox) == ASLEEP:
                    call(get(pool + WAIT), get(mailbox + WAKEUP), -1)
                waited = 0


@jit
def announce(pool, mailbox):  # type: ignore[no-untyped-def]
    """Have it looked into. Those before it that have no worker yet are found absent."""
    number = (mailbox - pool - HEADER) // MAILBOX + 1
    while True:
        before = load_acquire(pool + MAILBOXES)
        if before >= number or compare_exchange(pool + MAILBOXES, before, number):
            break


def spin(pauses, nothing):  # type: ignore[no-untyped-def]
    """As a worker waits."""
    for _ in range(pauses):
        pause(pauses)


@jit
def run_with_workers(pool, job, helpers):  # type: ignore[no-untyped-def]
    """The job's kernel, to its end, as worker 0 here and as up to so many others elsewhere."""
    put(job + DONE, 0)
    given = submit(pool, job, helpers)
    call(get(job + KERNEL), get(job + PARAMETERS), 0)
    given -= withdraw(pool, job)
    waited = 0
    while load_acquire(job + DONE) != given:
        if waited < WAITING:
            pause(job)
            waited += 1
        else:
            call(get(pool + NAP), get(pool + A_NAP), 0)


@jit
def submit(pool, job, helpers):  # type: ignore[no-untyped-def]
    """Put the job in the mailboxes of workers that have none, and wake those asleep; returns how many."""
    given = 0
    for worker in range(get(pool + MAILBOXES)):
        if given == helpers:
            break
        mailbox = pool + HEADER + MAILBOX * worker
        state = load_acquire(mailbox)
        if ASLEEP <= state <= IDLE and compare_exchange(mailbox, state, RESERVED):
            given += 1
            put(mailbox + NUMBER, given)
            store_release(mailbox, job)
            if state == ASLEEP:
                call(get(pool + POST), get(mailbox + WAKEUP), 1)
    return given


@jit
def withdraw(pool, job):  # type: ignore[no-untyped-def]
    """Take the job back where it was not begun; returns how often."""
    taken = 0
    for worker in range(get(pool + MAILBOXES)):
        mailbox = pool + HEADER + MAILBOX * worker
        if load_acquire(mailbox) == job:
            taken += compare_exchange(mailbox, job, IDLE)
    return taken
