"""Kernels run by a team of threads that an OpenMP runtime keeps for the calling thread: native code.

A parallel region is entered with as many threads as the runtime gives by default. GNU's ends and starts threads where a
region asks for another number than the one before, and the regions of the library that loaded it ask for none. What
threads find no task, or are more than the kernel has scratch memory for, does nothing. A nested region has one thread.
"""

from __future__ import annotations

from llvmlite import ir

from cubn import _floating_point
from cubn.backends.cpu.native import call, call_for_int, enter_default_mode, leave_default_mode, on_stack
from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.simd import I32, I64, Value, get, instruction
from cubn.backends.cpu.words import (
    CALLERS_MODE,
    HELPERS,
    IN_RUNTIME,
    KERNEL,
    LOCATION,
    OF_JOB,
    PARALLEL,
    PARAMETERS,
    TEAM_ENTRY,
    TEAM_NUMBER,
)

new_mode = instruction(I64)(on_stack(_floating_point.ROOM, 16))


@instruction()
def gnu_region(parallel: Value, entry: Value, job: Value) -> None:
    """GOMP_parallel(entry, job, as many threads as by default, no flags)."""
    b, kind = parallel.b, ir.FunctionType(ir.VoidType(), [I64, I64, I32, I32])
    b.call(b.inttoptr(parallel.v, ir.PointerType(kind)), [entry.v, job.v, I32(0), I32(0)])


@instruction()
def llvm_region(parallel: Value, location: Value, entry: Value, job: Value) -> None:
    """__kmpc_fork_call(location, one argument, entry, job)."""
    b, kind = parallel.b, ir.FunctionType(ir.VoidType(), [I64, I32, I64], var_arg=True)
    b.call(b.inttoptr(parallel.v, ir.PointerType(kind)), [location.v, I32(1), entry.v, job.v])


@jit
def run_in_team(pool, job):  # type: ignore[no-untyped-def]
    """The job's kernel, to its end. Threads that the runtime starts meanwhile begin with the caller's own mode."""
    runtime = get(job + IN_RUNTIME)
    parallel, location = get(runtime + PARALLEL), get(runtime + LOCATION)
    leave_default_mode(pool, job + CALLERS_MODE)
    if location:
        llvm_region(parallel, location, get(runtime + TEAM_ENTRY), job)
    else:
        gnu_region(parallel, get(runtime + TEAM_ENTRY), job)
    enter_default_mode(pool, job + CALLERS_MODE)


@jit
def take_part(job):  # type: ignore[no-untyped-def]
    """What each thread of the team does."""
    number = call_for_int(get(get(job + IN_RUNTIME) + TEAM_NUMBER))
    if number <= get(job + HELPERS):
        pool, mode = get(job + OF_JOB), new_mode(job)
        enter_default_mode(pool, mode)
        call(get(job + KERNEL), get(job + PARAMETERS), number)
        leave_default_mode(pool, mode)


def gnu_entry(job, nothing):  # type: ignore[no-untyped-def]
    """As GNU's runtime calls it: with the job alone."""
    take_part(job)


def llvm_entry(thread, bound, job):  # type: ignore[no-untyped-def]
    """As LLVM's and Intel's call it: with addresses of numbers of the thread before."""
    take_part(job)
    return 0
