"""Memory that Python and the native parts of the pool share, word by word: mailboxes, the pool, jobs and programs."""

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
"""Of the pool, MAILBOX bytes before its mailboxes: how many; functions of the C library, of the operating system and of
Python, and what they are given.
"""

SPINS = 30_000
"""Pauses, of some 15-50 ns, before a thread that waits sleeps: longer than an operation's work between two kernels."""

KERNEL, PARAMETERS, DONE, CALLERS_MODE = (WORD * i for i in range(4))
"""Of a job; the last is the caller's floating-point environment."""

OF_POOL, DETACHES, INTEGERS, FLOATS, IN_WORKSPACE, IN_STATISTICS, STAGES = (WORD * i for i in range(7))
TEMPLATE = WORD * 7
PLACES = TEMPLATE + WORD * BLOCK
"""Of a program: its pool, whether other Python threads may run meanwhile, how many there are of each of what follows
the template, which is the parameter block but for its addresses: places of integers and of floats in the block, pairs
(place, offset) of what lies in the workspace and in the statistics, pairs (kernel, helpers) of the stages.
"""

PROGRAM = bytes.__basicsize__ - 1
"""From a bytes object to what it holds."""
