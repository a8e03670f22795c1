"""How many threads an operation may use on the CPU."""

from __future__ import annotations

import operator
import os

from cubn.backends.cores import cores
from cubn.errors import message

MOST = 1 << 22
"""Threads that Linux has at most."""

limit: int | None = None
"""How many threads one operation may use; None where nobody has asked yet."""


def set_num_threads(n: int) -> None:
    """Set how many threads one operation may use on the CPU, the caller's included.

    Results do not depend on it. The default is the environment variable CUBN_NUM_THREADS; where that is not set, blank
    or `auto`, OMP_NUM_THREADS; else the cores that this process may keep busy. Where an OpenMP runtime is loaded, as
    PyTorch's is, an operation never uses more threads than that is told to, by `torch.set_num_threads` for one.

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
    """By the environment; None where it leaves the choice."""
    asked = os.environ.get("CUBN_NUM_THREADS", "").strip()
    if asked in ("", "auto"):
        return _number(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])  # a list is one number a level
    if number := _number(asked):
        return number
    remedy = "Unset it for as many threads as there are cores."
    raise ValueError(
        message("CUBN_NUM_THREADS", "be a whole number, 1 to 2**22, or auto", repr(asked), remedy, function="cubn")
    )


def _number(text: str) -> int | None:
    """A number of threads, where it is one."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 and 0 < int(text) <= MOST else None
