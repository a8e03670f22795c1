"""How many threads an operation may use on the CPU."""

from __future__ import annotations

import operator
import os

from cubn.errors import message

MOST = 1 << 22
"""Threads that Linux has at most."""

limit: int | None = None
"""How many threads one operation may use; None where nobody has asked yet."""


def set_num_threads(n: int) -> None:
    """Set how many threads one operation may use on the CPU, the caller's included.

    Results do not depend on it. The default is the environment variable CUBN_NUM_THREADS; where that is not set, blank
    or `auto`, the cores this process may run on.

    Parameters
    ----------
    n : int
        From 1 to 2**22, of Python or any library; more than there are cores is allowed.

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer, below 1, or more than 2**22.
    """
    global limit
    remedy = "Pass 1 for no parallelism."
    try:
        if isinstance(n, bool):
            raise TypeError
        number = operator.index(n)
    except TypeError:
        raise TypeError(message("n", "be an int", type(n).__name__, remedy, function="set_num_threads")) from None
    if number < 1:
        raise ValueError(
            message("n", "be at least 1", number if number > -MOST else "less", remedy, function="set_num_threads")
        )
    if number > MOST:
        raise ValueError(message("n", "be at most 2**22", "more", function="set_num_threads"))
    limit = number


def get_num_threads() -> int:
    """How many threads one operation may use on the CPU.

    Raises
    ------
    ValueError
        `set_num_threads` was not called, and the environment variable CUBN_NUM_THREADS is no number of threads. The
        first operation on the CPU raises it, too.
    """
    global limit
    if limit is None:
        limit = _asked_for() or cores()
    return limit


def _asked_for() -> int | None:
    """By the environment variable; None where it leaves the choice."""
    asked = os.environ.get("CUBN_NUM_THREADS", "").strip()
    if asked in ("", "auto"):
        return None
    if asked.isascii() and asked.isdigit() and len(asked) < 20 and 0 < int(asked) <= MOST:
        return int(asked)
    remedy = "Unset it for as many threads as there are cores."
    raise ValueError(
        message("CUBN_NUM_THREADS", "be a whole number, 1 to 2**22, or auto", repr(asked), remedy, function="cubn")
    )


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
