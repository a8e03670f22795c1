"""New statistics in place of the old ones: of all layers, or of none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from cubn import _arrays
from cubn._moments import Moments
from cubn._state.arrays import STATISTICS
from cubn._types import Update
from cubn.errors import message
from cubn.state import BatchNormState


class Target(NamedTuple):
    """Running statistics that are to be replaced."""

    state: BatchNormState
    set_counters: Callable[[int], None]
    """Say that so many updates made them, none of them skipped."""


def of_state(state: BatchNormState) -> Target:
    return Target(state, lambda batches: state._set_counters({"tracked": batches, "skipped": 0}))


def commit(targets: Mapping[str, Target], moments: Mapping[str, Moments], batches: int) -> None:
    """Replace the running statistics of all targets that there are moments of, or of none of them."""
    for name, pooled in moments.items():
        _check(name, targets[name].state, pooled)
    kept = [(targets[name].state, targets[name].state.copy()) for name in moments]
    with _signals_deferred():
        try:
            for name, pooled in moments.items():
                _replace(targets[name].state, pooled)
            for name in moments:
                targets[name].set_counters(batches)
        except BaseException:
            for state, before in kept:
                _put_back(state, before)
            raise


def _check(name: str, state: BatchNormState, pooled: Moments) -> None:
    """Raise unless the running statistics will be finite as they are stored."""
    rule = f"have finite statistics in every channel{f' of {name}' if name else ''}"
    if pooled.count < 2:
        raise ValueError(message("batches", "hold at least two values per channel", int(pooled.count)))
    var = pooled.var() if state.running_variance == "biased" else pooled.var_unbiased()
    finite = np.ones(state.num_features, bool)
    for array, values in zip((state.running_mean, state.running_var), (pooled.mean, var), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            finite &= np.isfinite(values.astype(_arrays.describe(array, "state").dtype))
    if not finite.all():
        channels = np.flatnonzero(~finite)[:10].tolist()
        remedy = "Leave out batches with a NaN or an infinity; the statistics stay as they were."
        raise ValueError(message("batches", rule, f"others in channels {channels}", remedy))


def _replace(state: BatchNormState, pooled: Moments) -> None:
    """An update of weight 1."""
    place = state._place()
    statistics = pooled._place(state.eps, place)
    with state._turn(), state._moving() as move:
        place.update(statistics, move.old, move.new, move.counters, Update(1.0, move.update.biased))


def _put_back(state: BatchNormState, before: BatchNormState) -> None:
    """The arrays and counters of a copy."""
    for name in STATISTICS:
        old = before._arrays[name]
        try:
            state._arrays[name][...] = old
        except TypeError:  # of an immutable library
            state._set_arrays({name: old}, check=False)
    state._set_counters(before._counts())


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Let handlers of signals, which may raise as that of Ctrl-C does, run when the block is done."""
    if threading.current_thread() is not threading.main_thread():  # the only one they run in
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Any] = {
        number: handler for number in signal.valid_signals() if callable(handler := signal.getsignal(number))
    }
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: arrived.append((number, frame)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in arrived:
            handlers[number](number, frame)
