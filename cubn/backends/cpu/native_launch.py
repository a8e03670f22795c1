"""`execute`, native code that runs a program, a launch's kernels one after the other.

It is a builtin function of Python (builtin.py) with the program for its self. It is called with addresses, of a
workspace and of statistics first, then with integers and floats, and puts them in the *parameter block*, a copy on its
stack of the block that the program brings along. All threads are done with that when it returns.
"""

from __future__ import annotations

from collections.abc import Callable

from cubn import _floating_point
from cubn.backends.cpu.native import (
    call,
    call_for_float,
    call_for_int,
    enter_default_mode,
    leave_default_mode,
    on_stack,
)
from cubn.backends.cpu.native_pool import run_with_workers, serve, spin
from cubn.backends.cpu.native_team import gnu_entry, llvm_entry, run_in_team
from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.parameters import BLOCK
from cubn.backends.cpu.simd import I64, LANES, Value, get, instruction, load_raw, put, store_raw
from cubn.backends.cpu.words import (
    AS_FLOAT,
    AS_INTEGER,
    ATTACH,
    BAD_ARGUMENT,
    CALLERS_MODE,
    DETACH,
    DETACHES,
    ERROR,
    FLOATS,
    HAS_TEAM,
    HELPERS,
    IN_RUNTIME,
    IN_STATISTICS,
    IN_WORKSPACE,
    INTEGERS,
    KEEP,
    KERNEL,
    NONE,
    OF_JOB,
    OF_POOL,
    PARALLEL,
    PARAMETERS,
    PLACES,
    PROGRAM,
    RUNTIME,
    STAGES,
    TEAM_SIZE,
    TEMPLATE,
)

Entry = Callable[..., int | None]

new_job = instruction(I64)(on_stack(CALLERS_MODE + _floating_point.ROOM, 16))
new_block = instruction(I64)(on_stack(8 * BLOCK, 128))  # whose counters are on cache lines of their own


@instruction()
def copy_block(source: Value, to: Value) -> None:
    for at in range(0, 8 * BLOCK, 8 * LANES):
        store_raw(load_raw(source + at, I64, 8), to + at, 8)


@jit
def fill(program, block, workspace, arguments):  # type: ignore[no-untyped-def]
    """The block of one call; returns where the program's stages are."""
    pool = get(program + OF_POOL)
    statistics = call(get(pool + AS_INTEGER), get(arguments), 0)
    copy_block(program + TEMPLATE, block)
    at, argument = program + PLACES, arguments + 8
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
def run_stages(program, block, workspace, job, stages, runtime):  # type: ignore[no-untyped-def]
    """Each kernel here and, where it is worth it, on other threads."""
    pool, most = get(program + OF_POOL), -1
    enter_default_mode(pool, job + CALLERS_MODE)
    put(job + PARAMETERS, block)
    put(job + OF_JOB, pool)
    put(job + IN_RUNTIME, runtime)
    for i in range(get(program + STAGES)):
        kernel, helpers = get(stages + 16 * i), get(stages + 16 * i + 8)
        if helpers and runtime:
            if most < 0:
                most = call_for_int(get(runtime + TEAM_SIZE)) - 1
            helpers = min(helpers, most)
        if helpers > 0:
            put(job + KERNEL, kernel)
            put(job + HELPERS, helpers)
            if get(workspace + HAS_TEAM) and runtime and get(runtime + PARALLEL):
                run_in_team(pool, job)
            else:
                run_with_workers(pool, job, helpers)
        else:
            call(kernel, block, 0)
    leave_default_mode(pool, job + CALLERS_MODE)


def execute(program_object, arguments, count):  # type: ignore[no-untyped-def]
    """Run a program on arguments, `count` Python objects."""
    program = program_object + PROGRAM
    pool, block, job = get(program + OF_POOL), new_block(arguments), new_job(arguments)
    if count != 2 + get(program + INTEGERS) + get(program + FLOATS):
        call(get(pool + BAD_ARGUMENT), 0, 0)
        return 0
    workspace = call(get(pool + AS_INTEGER), get(arguments), 0)
    stages = fill(program, block, workspace, arguments + 8)
    if call(get(pool + ERROR), 0, 0):
        return 0
    runtime = get(pool + RUNTIME)
    if get(program + DETACHES):
        thread = call(get(pool + DETACH), 0, 0)
        run_stages(program, block, workspace, job, stages, runtime)
        call(get(pool + ATTACH), thread, 0)
    else:
        run_stages(program, block, workspace, job, stages, runtime)
    none = get(pool + NONE)
    call(get(pool + KEEP), none, 0)
    return none


ENTRIES: dict[str, Entry] = {
    "execute": execute,
    "serve": serve,
    "spin": spin,
    "gnu-team": gnu_entry,
    "llvm-team": llvm_entry,
}
