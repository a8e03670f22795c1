"""Memory that Python and native code of the pool share, word by word: the pool, mailboxes, jobs and programs."""

from __future__ import annotations

from cubn.backends.cpu.parameters import BLOCK

WORD = 8
MAILBOX = 128
"""Bytes: a cache line each, and its neighbour that is fetched along."""

STATE, NUMBER, WAKEUP, POOL = (WORD * i for i in range(4))
"""Of a mailbox. The memory of its wakeup, a semaphore, is the second line."""

ABSENT, ASLEEP, IDLE, RESERVED, BUSY = range(5)
"""States of a mailbox; anything greater is the address of a job."""

MAILBOXES, SAVE_MODE, SET_MODE, DEFAULT_MODE, WAIT, POST, NAP, A_NAP = (WORD * i for i in range(8))
AS_INTEGER, AS_FLOAT, ERROR, BAD_ARGUMENT, DETACH, ATTACH, KEEP, NONE = (WORD * i for i in range(8, 16))
RUNTIME = WORD * 16
HEADER = 256
"""Of the pool, HEADER bytes before its mailboxes: how many; functions of the C library, of the operating system and of
Python, and what they are given; then where the words of the OpenMP runtime are, 0 for none, which is written, and read
by who will use them, under the GIL.
"""

TEAM_SIZE, TEAM_NUMBER, PARALLEL, TEAM_ENTRY, LOCATION = (WORD * i for i in range(5))
"""Of a runtime, never changed: omp_get_max_threads and omp_get_thread_num, what runs a parallel region (0: none is to
be entered), what every thread of a team runs in it, and LLVM's source location, which GNU's runtime does not take.
"""

WAITING = 30_000
"""Pauses, of some 15-50 ns, before a caller naps that waits for workers to finish their last tasks."""

KERNEL, PARAMETERS, DONE, OF_JOB, IN_RUNTIME, HELPERS, CALLERS_MODE = (WORD * i for i in range(7))
"""Of a job: what is run, on what, how many workers are done, its pool, the words of its runtime, how many may help, and
the caller's floating-point environment.
"""

OF_POOL, DETACHES, INTEGERS, FLOATS, IN_WORKSPACE, IN_STATISTICS, STAGES = (WORD * i for i in range(7))
TEMPLATE = WORD * 7
PLACES = TEMPLATE + WORD * BLOCK
"""Of a program: its pool, whether other Python threads may run meanwhile, how many there are of each of what follows
the template, which is the parameter block but for its addresses: places of integers and of floats in the block, pairs
(place, offset) of what lies in the workspace and in the statistics, pairs (kernel, helpers) of the stages.
"""

PROGRAM = bytes.__basicsize__ - 1
"""From a bytes object to what it holds."""

HAS_TEAM = -WORD
"""From a workspace: whether its thread may enter parallel regions of the OpenMP runtime."""
