"""What a state holds: taken, lent to operations and moved, by one thread at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays, _nodes
from cubn._arguments import on_host, refusal
from cubn._arrays import Array
from cubn._layout import vector
from cubn._state.arrays import ARRAYS, STATISTICS, StateArrays, check_on_host, check_together, checked_arrays, described
from cubn._state.counted import COUNTERS, Counted, Int64, counted
from cubn._state.options import DTYPES, STATE, Options, check_counts, checked_momentum, counts
from cubn._types import Counters, Running, Update
from cubn._weak import WeakObjects
from cubn.backends import backend_for
from cubn.backends.protocol import Backend
from cubn.errors import device_name, message, reporting_as

NO_STATISTICS = "a state with track=False"

Float64 = NDArray[np.float64]


class Move(NamedTuple):
    """Running statistics that are to move, and how."""

    old: Running
    new: Running  # which is the same memory, unless a library is immutable
    counters: Counters
    update: Update

    @property
    def in_place(self) -> bool:
        """Whether what there was is gone once they have moved."""
        return self.new == self.old


class Holding:
    """Options, arrays and counters that fit each other, and the lock that keeps them so."""

    __slots__ = (  # what is not among them, `training` say, cannot be set by mistake
        "__weakref__",
        "_arrays",
        "_counters",
        "_held",
        "_lock",
        "_options",
    )
    _arrays: dict[str, Any]
    _counters: Counted | None
    _held: StateArrays | None  # as last described, where that may be true for longer
    _lock: threading.RLock
    _options: Options

    def _begin(
        self,
        options: Options,
        arrays: Mapping[str, Any],
        counters: Mapping[str, Any] | None = None,
        *,
        check: bool = True,
    ) -> None:
        """Options, arrays, and counters where they are not 0."""
        self._options = options
        self._arrays = dict.fromkeys(ARRAYS)
        self._counters = None
        self._held = checked_arrays({})
        self._lock = threading.RLock()
        _STATES.add(self)
        self._set_arrays(arrays, check=check)
        if counters:
            self._set_counters(counters)

    @reporting_as(STATE)
    def _set_options(self, **options: Any) -> None:
        """Take options, which were checked."""
        with self._turn():
            self._options = self._options._replace(**options)

    @reporting_as(STATE)
    def _set_arrays(self, changes: Mapping[str, Any], *, check: bool = True) -> None:
        """Take arrays, if they and those already held fit each other."""
        with self._turn():
            arrays = self._arrays | dict(changes)
            found = self._describe(arrays)
            held = checked_arrays(found, arrays)
            check_together(found)
            if check:
                check_on_host({name: found[name] for name in changes if name in found})
            self._arrays = arrays
            self._remember(held)
            if held.running and self._counters is None:
                self._counters = counted(None, self._no_counts())

    @reporting_as(STATE)
    def _set_counters(self, changes: Mapping[str, Any]) -> None:
        """Take counters."""
        with self._turn():
            if self._counters is None:
                if any(value is not None for value in changes.values()):
                    name = next(iter(changes))
                    remedy = "Only a state with running statistics counts their updates."
                    raise ValueError(message(name, "be None", NO_STATISTICS, remedy))
                return
            counters = self._counters.on_host()
            counters |= {name: counts(value, name, self._options.num_features) for name, value in changes.items()}
            check_counts(**counters)
            self._counters = counted(self._counters.place, counters)

    def _counts(self) -> dict[str, Int64]:
        """Copies of the counters in NumPy, where there are any."""
        return {} if self._counters is None else self._counters.on_host()

    def _no_counts(self) -> dict[str, Int64]:
        return {name: np.zeros(self._options.num_features, np.int64) for name in COUNTERS}

    def _read(self, x: Array) -> StateArrays:
        """The arrays, for an operation on x; they stay alive with the result.

        A framework may have moved or converted them since they were assigned.
        """
        held = self._current()
        if held.device not in (None, x.device):
            rule = f"be on the state's device, {device_name(held.device)}"
            raise ValueError(refusal("x", rule, x, "Move one of them to the other's device."))
        return held

    def _check_updatable(self, held: StateArrays | None = None) -> None:
        """Raise unless the running statistics (those held) can be written, or replaced."""
        if self._counters is None:
            remedy = "Make the state with track=True."
            raise ValueError(message("state", "have running statistics", NO_STATISTICS, remedy))
        held = held or self._current()
        for name in STATISTICS:
            array = held.arrays[name]
            if array.dtype not in DTYPES:
                remedy = "Make a state of float32 copies: at small momenta a variance of 16 bits stops moving."
                rule = "have dtype float32 or float64 to be updated"
                raise TypeError(refusal(name, rule, array, remedy))
            if not array.library.immutable:
                _arrays.check_writable(array, name)
        momentum = self._options.momentum
        if momentum is not None and not 0 <= momentum <= 1:
            checked_momentum(momentum)

    def _place(self) -> Backend:
        """Where the running statistics are updated when there is no x to say so."""
        arrays = self._current().arrays
        mean, var = (arrays[name] for name in STATISTICS)
        if mean.library is var.library:
            return _home(mean)
        return backend_for(mean.device, mean.library.name, var.library.name)

    def _turn(self) -> threading.RLock:
        """The lock, for a `with`; an error where this thread holds it, since what it is at would be torn."""
        if self._lock._is_owned():  # type: ignore[attr-defined]
            rule = "not be used in the midst of its own update, copy or assignment"
            got = "a call from a signal handler, a __del__ or the like"
            remedy = "Set a flag there, and do this after the step."
            raise RuntimeError(message("state", rule, got, remedy))
        return self._lock

    def _now(self, held: StateArrays | None) -> StateArrays:
        """The arrays (those held, if they still are), on the device where those held were."""
        if held is not None and held is self._held:
            return held
        now = self._current()
        if held and held.device != now.device:
            moved = now.arrays["running_mean"]
            raise ValueError(refusal("running_mean", "stay on x's device meanwhile", moved))
        return now

    @contextmanager
    def _moving(self, held: StateArrays | None = None) -> Iterator[Move]:
        """The running statistics (those held, if they still are), for a backend to move; inside a turn.

        `_check_updatable` has passed. What was written becomes the state's unless an error is raised.
        """
        before, held = held, self._now(held)
        if held is not before:
            self._check_updatable(held)
        arrays = [held.arrays[name] for name in STATISTICS]
        fresh = [_arrays.empty_vector(a.shape[0], a.dtype, a) if a.library.immutable else None for a in arrays]
        assert self._counters
        assert held.running
        new = Running(*(vector(f.array) if f else old for f, old in zip(fresh, held.running, strict=True)))
        place = _home(arrays[0])
        if self._counters.device is not place.device:
            self._counters = counted(place, self._counts())
        counters = self._counters
        if any(fresh):  # whose libraries may refuse them: all of it moves, or nothing
            counters = counters.copied()
        with counters as at:
            yield Move(held.running, new, at, self._options.how_to_update)
        changed = {name: output.finish() for name, output in zip(STATISTICS, fresh, strict=True) if output}
        if changed:
            self._arrays, self._counters = self._arrays | changed, counters
        else:
            held.mark_written()

    def _move_to_zero_and_one(self) -> None:
        """An update of weight 1 by two values of mean 0 and variance 1, which nothing counts."""
        place, C = self._place(), self._options.num_features
        statistics = place.place_statistics(_nodes.statistics(2, np.zeros(C), np.ones(C), self._options.eps), C)
        with self._moving() as move, counted(place, self._no_counts()) as uncounted:
            place.update(statistics, move.old, move.new, uncounted, Update(1.0, biased=False))

    def _running_on_host(self) -> tuple[Float64, Float64] | None:
        """Running mean and variance as they are, both at one moment; None without any."""
        with self._turn():
            arrays = self._current().arrays
            if self._counters is None:
                return None
            mean, var = (on_host(arrays[name]).astype(np.float64) for name in STATISTICS)
        return mean, var

    def _current(self) -> StateArrays:
        arrays, held = self._arrays, self._held
        if held is None or not held.describes(arrays):
            held = checked_arrays(self._describe(arrays), arrays)
            self._remember(held)
        return held

    def _remember(self, held: StateArrays) -> None:
        """Remember the description; not a capsule, which would keep memory from an owner who may give it away."""
        self._held = None if any(array.capsule for array in held.arrays.values()) else held

    def _describe(self, arrays: Mapping[str, Any]) -> dict[str, Array]:
        """The arrays there are, each with the state's number of channels."""
        found = {name: described(a, name) for name, a in arrays.items() if a is not None}
        for name, array in found.items():
            if array.shape != (self._options.num_features,):
                rule = f"have shape ({self._options.num_features},), one value per channel"
                raise ValueError(refusal(name, rule, array))
        return found


def _home(mean: Array) -> Backend:
    """Where the counters of running statistics are: with the backend of their library."""
    return backend_for(mean.device, mean.library.name)


_STATES: WeakObjects[Holding] = WeakObjects()


def _release_locks() -> None:
    """In a forked child: a lock held by a thread that does not exist here would never be released."""
    for state in _STATES.alive():
        if not state._lock._is_owned():  # type: ignore[attr-defined]
            state._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks)
