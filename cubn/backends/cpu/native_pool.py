"""The native parts of the pool (pool.py), in the language of kernels: `serve`, which a worker runs for ever, and
`execute`, which runs a program, a launch's kernels one after the other.

`execute` is a builtin function of Python (builtin.py) with the program for its self. It is called with addresses, of a
workspace and of statistics first, then with integers and floats, and puts them in the *parameter block*, a copy on its
stack of the block that the program brings along. All workers are done with that when it returns.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

from llvmlite import ir

from cubn import _floating_point
from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.parameters import BLOCK
from cubn.backends.cpu.simd import (
    DOUBLE,
    I64,
    LANES,
    Value,
    get,
    instruction,
    load_raw,
    pointer,
    put,
    store_raw,
)
from cubn.backends.cpu.words import (
    A_NAP,
    AS_FLOAT,
    AS_INTEGER,
    ASLEEP,
    ATTACH,
    BAD_ARGUMENT,
    BUSY,
    CALLERS_MODE,
    DEFAULT_MODE,
    DETACH,
    DETACHES,
    DONE,
    ERROR,
    FLOATS,
    IDLE,
    IN_STATISTICS,
    IN_WORKSPACE,
    INTEGERS,
    KEEP,
    KERNEL,
    MAILBOX,
    MAILBOXES,
    NAP,
    NONE,
    NUMBER,
    OF_POOL,
    PARAMETERS,
    PLACES,
    POOL,
    POST,
    PROGRAM,
    RESERVED,
    SAVE_MODE,
    SET_MODE,
    SPINS,
    STAGES,
    TEMPLATE,
    WAIT,
    WAKEUP,
)

X86 = platform.machine() in ("x86_64", "AMD64")
MXCSR = 0x1F80  # the default of the register that all floating-point arithmetic of kernels obeys on x86-64

Entry = Callable[..., int | None]


@instruction(I64)
def load_acquire(address: Value) -> Value:
    b = address.b
    return Value(b, b.load_atomic(pointer(address, I64), "acquire", 8, typ=I64))


@instruction()
def store_release(address: Value, value: Value) -> None:
    address.b.store_atomic(value.v, pointer(address, I64), "release", 8)


@instruction(I64)
def compare_exchange(address: Value, before: Value, after: Value) -> Value:
    """1 if it happened."""
    b = address.b
    pair = b.cmpxchg(pointer(address, I64), before.v, after.v, "acq_rel", "monotonic")
    return Value(b, b.zext(b.extract_value(pair, 1), I64))


@instruction()
def add_one(address: Value) -> None:
    address.b.atomic_rmw("add", pointer(address, I64), I64(1), "release")


@instruction(I64)
def call(function: Value, first: Value, second: Value) -> Value:
    """A function of up to two integers or addresses, by its own address; of one that returns nothing, anything."""
    b, kind = function.b, ir.FunctionType(I64, [I64] * 2)
    return Value(b, b.call(b.inttoptr(function.v, ir.PointerType(kind)), [first.v, second.v]))


@instruction(I64)
def call_for_float(function: Value, first: Value) -> Value:
    """The bits of the float64 that a function of an address returns."""
    b, kind = function.b, ir.FunctionType(DOUBLE, [I64])
    return Value(b, b.bitcast(b.call(b.inttoptr(function.v, ir.PointerType(kind)), [first.v]), I64))


def on_stack(size: int, align: int) -> Callable[[Value], Value]:
    """Emits memory that lasts until the function returns."""

    def emit(anything: Value) -> Value:
        b = anything.b
        with b.goto_entry_block():
            room = b.alloca(ir.ArrayType(I64, size // 8))
            room.align = align
        return Value(b, b.ptrtoint(room, I64))

    return emit


new_job = instruction(I64)(on_stack(CALLERS_MODE + _floating_point.ROOM, 16))
new_block = instruction(I64)(on_stack(8 * BLOCK, 128))  # whose counters are on cache lines of their own


@instruction()
def copy_block(source: Value, to: Value) -> None:
    for at in range(0, 8 * BLOCK, 8 * LANES):
        store_raw(load_raw(source + at, I64, 8), to + at, 8)


@instruction()
def pause(anything: Value) -> None:
    if X86:
        _intrinsic(anything, "llvm.x86.sse2.pause")


@instruction()
def save_mxcsr(to: Value) -> None:
    _intrinsic(to, "llvm.x86.sse.stmxcsr", pointer(to, ir.IntType(8)))


@instruction()
def load_mxcsr(source: Value) -> None:
    _intrinsic(source, "llvm.x86.sse.ldmxcsr", pointer(source, ir.IntType(8)))


def _intrinsic(anything: Value, name: str, *arguments: ir.Value) -> None:
    b, kind = anything.b, ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), arguments)


@jit
def enter_default_mode(pool, callers):  # type: ignore[no-untyped-def]
    """Compute in the default floating-point environment, and keep the caller's."""
    if X86:
        save_mxcsr(callers)
        put(callers + 8, MXCSR)
        load_mxcsr(callers + 8)
    else:
        call(get(pool + SAVE_MODE), callers, 0)
        call(get(pool + SET_MODE), get(pool + DEFAULT_MODE), 0)


@jit
def leave_default_mode(pool, callers):  # type: ignore[no-untyped-def]
    if X86:
        load_mxcsr(callers)
    else:
        call(get(pool + SET_MODE), callers, 0)


def serve(mailbox, spins):  # type: ignore[no-untyped-def]
    """For ever do what is put in the mailbox, asleep where nothing has come for a while."""
    pool, waited = get(mailbox + POOL), 0
    call(get(pool + SET_MODE), get(pool + DEFAULT_MODE), 0)
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
            if waited > spins and compare_exchange(mailbox, IDLE, ASLEEP):
                while load_acquire(mailbox) == ASLEEP:
                    call(get(pool + WAIT), get(mailbox + WAKEUP), -1)
                waited = 0


@jit
def submit(pool, job, helpers):  # type: ignore[no-untyped-def]
    """Put the job in the mailboxes of workers that have none, and wake those asleep; returns how many."""
    given = 0
    for worker in range(get(pool + MAILBOXES)):
        if given == helpers:
            break
        mailbox = pool + MAILBOX * (worker + 1)
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
        mailbox = pool + MAILBOX * (worker + 1)
        if load_acquire(mailbox) == job:
            taken += compare_exchange(mailbox, job, IDLE)
    return taken


@jit
def fill(program, block, arguments):  # type: ignore[no-untyped-def]
    """The block of one call; returns where the program's stages are."""
    pool = get(program + OF_POOL)
    workspace = call(get(pool + AS_INTEGER), get(arguments), 0)
    statistics = call(get(pool + AS_INTEGER), get(arguments + 8), 0)
    copy_block(program + TEMPLATE, block)
    at, argument = program + PLACES, arguments + 16
    for _ in range(get(program + INTEGERS)):
        put(block + get(at), call(get(pool + AS_INTEGER), get(argument), 0))
        at += 8
        argument += 8
    for _ in range(get(program + FLOATS)):
        put(block + get(at), call_for_float(get(pool + AS_FLOAT), get(argument)))
        at += 8
        argument += 8
    for _ in range(get(program + IN_WORKSPACE)):
        put(block + get(at), workspace + get(at + 8))
        at += 16
    for _ in range(get(program + IN_STATISTICS)):
        put(block + get(at), statistics + get(at + 8))
        at += 16
    return at


@jit
def run_stages(program, block, job, stages):  # type: ignore[no-untyped-def]
    """Each kernel as worker 0 here and as up to so many others elsewhere."""
    pool = get(program + OF_POOL)
    enter_default_mode(pool, job + CALLERS_MODE)
    put(job + PARAMETERS, block)
    for i in range(get(program + STAGES)):
        kernel, helpers = get(stages + 16 * i), get(stages + 16 * i + 8)
        given = 0
        if helpers:
            put(job + KERNEL, kernel)
            put(job + DONE, 0)
            given = submit(pool, job, helpers)
        call(kernel, block, 0)
        if given:
            given -= withdraw(pool, job)
            waited = 0
            while load_acquire(job + DONE) != given:
                if waited < SPINS:
                    pause(job)
                    waited += 1
                else:
                    call(get(pool + NAP), get(pool + A_NAP), 0)
    leave_default_mode(pool, job + CALLERS_MODE)


def execute(program_object, arguments, count):  # type: ignore[no-untyped-def]
    """Run a program on arguments, `count` Python objects."""
    program = program_object + PROGRAM
    pool, block, job = get(program + OF_POOL), new_block(arguments), new_job(arguments)
    if count != 2 + get(program + INTEGERS) + get(program + FLOATS):
        call(get(pool + BAD_ARGUMENT), 0, 0)
        return 0
    stages = fill(program, block, arguments)
    if call(get(pool + ERROR), 0, 0):
        return 0
    if get(program + DETACHES):
        thread = call(get(pool + DETACH), 0, 0)
        run_stages(program, block, job, stages)
        call(get(pool + ATTACH), thread, 0)
    else:
        run_stages(program, block, job, stages)
    none = get(pool + NONE)
    call(get(pool + KEEP), none, 0)
    return none


ENTRIES: dict[str, Entry] = {"serve": serve, "execute": execute}
