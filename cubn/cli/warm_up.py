"""`python -m cubn warm-up`: compile kernels ahead of their first use, on all cores, and keep them in the cache.

Small calls of the operations are made, one of every kind that has kernels of its own: so what is compiled is what
such calls on larger arrays use.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple, TypeVar

import numpy as np

import cubn
from cubn.backends.cores import cores

SHAPES = {  # by layout: channel axis and shapes, of which no two are worked on by the same kernels
    "nchw": (1, ((16, 64, 32, 32), (16, 3, 64, 64), (64, 64, 7, 7), (4096, 3, 7, 7))),
    "nhwc": (-1, ((16, 16, 16, 64), (16, 16, 16, 256))),
    "2d": (1, ((4096, 64), (4096, 256), (4096, 8))),
}
DTYPES = ("float32", "float64", "float16", "bfloat16")
FUSED = ("plain", "relu", "residual", "residual-relu")
OPERATIONS = ("forward_train", "backward", "forward", "moments")


class Call(NamedTuple):
    """A kind of call: of `forward_train`, and of other operations on the same array."""

    shape: tuple[int, ...]
    channel_axis: int
    dtype: str
    fused: str
    operations: tuple[str, ...]


def calls(
    layouts: Iterable[str], dtypes: Iterable[str], fused: Iterable[str], operations: Sequence[str]
) -> Iterator[Call]:
    """Every kind of call that is asked for."""
    for layout, dtype, how in itertools.product(layouts, dtypes, fused):
        channel_axis, shapes = SHAPES[layout]
        for shape in shapes:
            yield Call(shape, channel_axis, dtype, how, tuple(operations))


def make(call: Call) -> list[str]:
    """Make a call; the names of the kernels that were compiled for it."""
    from cubn.backends.cpu.compile import compiled_here

    before = len(compiled_here)
    x = np.zeros(call.shape, _dtype(call.dtype))
    state = cubn.BatchNormState(x.shape[call.channel_axis], channel_axis=call.channel_axis)
    options: dict[str, Any] = {"relu": "relu" in call.fused, "residual": x.copy() if "residual" in call.fused else None}
    if {"forward_train", "backward"} & set(call.operations):
        _, saved = cubn.forward_train(x, state, **options)
        if "backward" in call.operations:
            cubn.backward(x, saved)
    if "forward" in call.operations:
        cubn.forward(x, state, **options)
    if "moments" in call.operations:
        cubn.update(state, cubn.moments(x, channel_axis=call.channel_axis))
    return compiled_here[before:]


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError(
                f"cubn warm-up: bfloat16 arrays of NumPy need ml_dtypes ({error}). "
                "Install it with: pip install ml_dtypes"
            ) from error
        name = ml_dtypes.bfloat16
    return np.dtype(name)


def _alone() -> None:
    """What a process that makes calls is: two threads, as kernels of several differ; its parent does the talking.

    Ctrl-C, which a terminal sends to all, ends it at once; no file of the cache is ever half written.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    logging.getLogger("cubn").setLevel(logging.ERROR)
    cubn.set_num_threads(2)


_CAN_WAIT = hasattr(signal, "pthread_sigmask")


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Until later, here and in processes that are started: those could only end with a traceback yet."""
    if _CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if _CAN_WAIT:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def warm_up(
    layouts: Sequence[str], dtypes: Sequence[str], fused: Sequence[str], operations: Sequence[str], processes: int = 0
) -> int:
    """Fill the cache and say what was compiled; 0 if all of it is kept."""
    for dtype in dtypes:
        _dtype(dtype)  # refused here, not in another process
    return in_processes(make, list(calls(layouts, dtypes, fused, operations)), processes)


T = TypeVar("T")


def in_processes(make: Callable[[T], list[str]], wanted: Sequence[T], processes: int) -> int:
    """Let processes compile for the CPU what calls of these kinds need, and say what it was; 0 if all of it is kept."""
    from cubn.backends.cpu import cache

    processes = min(processes or cores(), len(wanted))
    begin, names = time.monotonic(), set[str]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _alone) as executor:
        with _ctrl_c_waits():
            futures = [executor.submit(make, call) for call in wanted]
        try:
            for future in _with_progress(futures):
                names.update(future.result())
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    by = f"{processes} process{'es' * (processes > 1)}, for {len(wanted)} kinds of calls"
    lost = [name for name in names if cache.load(name) is None]
    return said(len(names), time.monotonic() - begin, by, len(lost))


def said(kernels: int, seconds: float, by: str, lost: int) -> int:
    """Say what was compiled; 0 if all of it is kept."""
    print(f"Compiled {kernels} kernel{'s' * (kernels != 1)} in {seconds:.0f} s, {by}.")
    if lost:
        print(f"{lost} could not be kept: see the kernel cache in `python -m cubn info`.", file=sys.stderr)
    return 1 if lost else 0


def _with_progress(futures: list[Future[list[str]]]) -> Iterator[Future[list[str]]]:
    """Futures as they are done, behind a progress bar, or lines where there is no tqdm."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        yield from tqdm(as_completed(futures), total=len(futures), desc="compiling", unit="call")
        return
    for i, future in enumerate(as_completed(futures), 1):
        print(f"compiling: {i} of {len(futures)}", file=sys.stderr)
        yield future
