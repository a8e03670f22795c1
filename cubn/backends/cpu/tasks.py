"""How the threads of a launch share its tasks.

Tasks are in the order of memory, and are cut into as many ranges as there are threads, or `parameters.RANGES`. A thread
claims those of its own range first, so that from stage to stage, and from call to call, it comes upon what is in its
caches, as it does between operations of libraries that share out memory evenly. Then it helps with the others' ranges:
all is done however many threads have come. Nothing depends on who does what.
"""

from __future__ import annotations

from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.simd import LINE, claim


@jit
def next_task(counters, tasks, ranges, worker, exhausted):  # type: ignore[no-untyped-def]
    """(task, ranges found exhausted): -1 after the last. There is a counter of claims for each range, a line apart."""
    task = -1
    while exhausted < ranges and task < 0:
        r = (worker + exhausted) % ranges
        task = tasks * r // ranges + claim(counters + r * LINE)
        if task >= tasks * (r + 1) // ranges:
            task = -1
            exhausted += 1
    return task, exhausted


@jit
def next_task_backwards(counters, tasks, ranges, worker, exhausted):  # type: ignore[no-untyped-def]
    """The same, each range from its end: that is what the stage before has left in the caches."""
    task = -1
    while exhausted < ranges and task < 0:
        r = (worker + exhausted) % ranges
        task = tasks * (r + 1) // ranges - 1 - claim(counters + r * LINE)
        if task < tasks * r // ranges:
            task = -1
            exhausted += 1
    return task, exhausted
