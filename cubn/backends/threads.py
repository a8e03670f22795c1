"""A pool of Python threads that run nogil kernels: safe under any number of caller threads, and after fork.

A job is a native function `kernel(parameters, worker)` that claims tasks from an atomic counter in its parameters until
none is left. The calling thread always takes part, so a job finishes even if no worker is free, and a call never waits for
another caller's job.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

_limit: int | None = None


def set_num_threads(n: int) -> None:
    """Set how many threads one operation may use on the CPU, the caller's included.

    Results do not depend on it. The default is the environment variable CUBN_NUM_THREADS, else the cores this process may
    run on.

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
        _limit = int(asked) if asked.isdigit() and int(asked) > 0 else _cores()
    return _limit


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Job:
    """One kernel launch: workers enter while it is open; the caller closes it and waits for those inside."""

    __slots__ = ("_inside", "_left", "_lock", "_open", "kernel", "parameters", "places")

    def __init__(self, kernel: Callable[[int, int], None], parameters: int, places: int) -> None:
        self.kernel, self.parameters, self.places = kernel, parameters, places
        self._lock, self._left = threading.Lock(), threading.Lock()
        self._inside, self._open = 0, True

    def help(self) -> None:
        """Run the kernel as a worker, unless the job is over."""
        with self._lock:
            if not self._open or self.places == 0:
                return
            worker = self.places
            self.places -= 1
            if self._inside == 0:
                self._left.acquire()
            self._inside += 1
        self.kernel(self.parameters, worker)
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._left.release()

    def close(self) -> None:
        """Let no further worker in, and wait for those inside."""
        with self._lock:
            self._open = False
        with self._left:
            pass


class _Pool:
    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Semaphore(0)
        self._grow = threading.Lock()
        self._size = 0

    def run(self, kernel: Callable[[int, int], None], parameters: int, threads: int) -> None:
        """Run `kernel(parameters, worker)` on the caller (worker 0) and up to `threads - 1` others (1, 2, ...); return when done."""
        helpers = threads - 1
        if self._size < helpers:
            self._start(helpers)
        job = _Job(kernel, parameters, helpers)
        self._jobs.extend([job] * helpers)
        self._wake.release(helpers)
        kernel(parameters, 0)
        job.close()

    def _start(self, size: int) -> None:
        with self._grow:
            for _ in range(self._size, size):
                threading.Thread(target=self._work, name="cubn", daemon=True).start()
            self._size = max(self._size, size)

    def _work(self) -> None:
        while True:
            self._wake.acquire()
            self._jobs.popleft().help()


_pool = _Pool()


def run(kernel: Callable[[int, int], None], parameters: int, threads: int) -> None:
    """Run `kernel(parameters, worker)` for worker 0 .. at most threads - 1 until every task is claimed and done."""
    if threads == 1:
        kernel(parameters, 0)
    else:
        _pool.run(kernel, parameters, threads)


def _forget_pool() -> None:
    """A forked child has none of its parent's threads: start anew."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
