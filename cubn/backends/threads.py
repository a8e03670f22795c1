"""How many threads an operation may use on the CPU."""

from __future__ import annotations

import os

_limit: int | None = None


def set_num_threads(n: int) -> None:
    """Set how many threads one operation may use on the CPU, the caller's included.

    Results do not depend on it. The default is the environment variable CUBN_NUM_THREADS, else the cores this process
    may run on.

    Parameters
    ----------
    n : int
        At least 1; more than there are cores is allowed.

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer, or below 1.
    """
    global _limit
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"set_num_threads: n must be an int; got {type(n).__name__}. Pass 1 for no parallelism.")
    if n < 1:
        raise ValueError(f"set_num_threads: n must be at least 1; got {n}. Pass 1 for no parallelism.")
    _limit = n


def get_num_threads() -> int:
    """How many threads one operation may use on the CPU."""
    global _limit
    if _limit is None:
        asked = os.environ.get("CUBN_NUM_THREADS", "")
        _limit = int(asked) if asked.isdigit() and int(asked) > 0 else cores()
    return _limit


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
