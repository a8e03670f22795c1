"""What a state holds: taken, lent to operations and moved, by one thread at a time."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays
from cubn._arguments import backend, refusal
from cubn._arrays import Array
from cubn._arrays.library import HOST
from cubn._layout import vector
from cubn._state.arrays import ARRAYS, STATISTICS, Held, check_on_host, check_together, described, hold
from cubn._state.options import DTYPES, STATE, Options, check_counts, checked_momentum, counts
from cubn._types import BackendArray, CPU, Running
from cubn.backends.protocol import Backend
from cubn.errors import device_name, message

Int64 = NDArray[np.int64]

NO_STATISTICS = "a state with track=False"


COUNTERS = ("tracked", "skipped")


class Counters(NamedTuple):
    """Per channel, int64: where the running statistics are, and nobody else's."""

    tracked: BackendArray
    skipped: BackendArray
    device: tuple[int, int]


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
    _counters: Counters | None
    _held: Held | None  # as last described, where that may be true for longer
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
        self._held = hold({}, STATE)
        self._lock = threading.RLock()
        _STATES.add(self)
        self._assign(arrays, check=check)
        if counters:
            self._count(counters)

    def _choose(self, **options: Any) -> None:
        """Take options, which were checked."""
        with self._turn(STATE):
            self._options = self._options._replace(**options)

    def _assign(self, changes: Mapping[str, Any], *, check: bool = True) -> None:
        """Take arrays, if they and those already held fit each other."""
        with self._turn(STATE):
            arrays = self._arrays | dict(changes)
            found = self._describe(arrays, STATE)
            held = hold(found, STATE)
            check_together(found)
            if check:
                check_on_host({name: found[name] for name in changes if name in found})
            self._arrays = arrays
            self._keep(held)
            if held.running and self._counters is None:
                self._counters = Counters(**self._no_counts(), device=HOST)

    def _count(self, changes: Mapping[str, Any]) -> None:
        """Take counters."""
        with self._turn(STATE):
            if self._counters is None:
                if any(value is not None for value in changes.values()):
                    name = next(iter(changes))
                    remedy = "Only a state with running statistics counts their updates."
                    raise ValueError(message(STATE, name, "be None", NO_STATISTICS, remedy))
                return
            counters = self._counts()
            counters |= {name: counts(value, name, self._options.num_features) for name, value in changes.items()}
            check_counts(**counters)
            self._place_counters(self._counters.device, counters)

    def _counts(self) -> dict[str, Int64]:
        """Copies of the counters in NumPy, where there are any."""
        counters = self._counters
        if counters is None:
            return {}
        place = None if counters.device[0] == CPU else backend(counters.device)
        return {name: place.to_host(c) if place else c.copy() for name, c in zip(COUNTERS, counters, strict=False)}

    def _no_counts(self) -> dict[str, Int64]:
        return {name: np.zeros(self._options.num_features, np.int64) for name in COUNTERS}

    def _place_counters(self, device: tuple[int, int], values: Mapping[str, Int64]) -> None:
        """Counters of these values, which are nobody else's, where the running statistics are."""
        place = None if device[0] == CPU else backend(device)
        tracked, skipped = (place.from_host(values[name]) if place else values[name] for name in COUNTERS)
        self._counters = Counters(tracked, skipped, device)

    def _read(self, function: str, x: Array) -> Held:
        """The arrays, for an operation on x; they stay alive with the result.

        A framework may have moved or converted them since they were assigned.
        """
        held = self._current(function)
        if held.device not in (None, x.device):
            rule = f"be on the state's device, {device_name(held.device)}"
            raise ValueError(refusal(function, "x", rule, x, "Move one of them to the other's device."))
        return held

    def _check_updatable(self, function: str, held: Held | None = None) -> None:
        """Raise unless the running statistics (those held) can be written, or replaced."""
        if self._counters is None:
            remedy = "Make the state with track=True."
            raise ValueError(message(function, "state", "have running statistics", NO_STATISTICS, remedy))
        held = held or self._current(function)
        for name in STATISTICS:
            array = held.arrays[name]
            if array.dtype not in DTYPES:
                remedy = "Make a state of float32 copies: at small momenta a variance of 16 bits stops moving."
                rule = "have dtype float32 or float64 to be updated"
                raise TypeError(refusal(function, name, rule, array, remedy))
            if not array.library.immutable:
                _arrays.check_writable(array, function, name)
        momentum = self._options.momentum
        if momentum is not None and not 0 <= momentum <= 1:
            checked_momentum(momentum, function)

    def _place(self, function: str) -> Backend:
        """Where the running statistics are updated when there is no x to say so."""
        mean = self._current(function).arrays["running_mean"]
        return backend(mean.device, mean.library.name)

    def _turn(self, function: str) -> threading.RLock:
        """The lock, for a `with`; an error where this thread holds it, since what it is at would be torn."""
        if self._lock._is_owned():  # type: ignore[attr-defined]
            rule = "not be used in the midst of its own update, copy or assignment"
            got = "a call from a signal handler, a __del__ or the like"
            remedy = "Set a flag there, and do this after the step."
            raise RuntimeError(message(function, "state", rule, got, remedy))
        return self._lock

    @contextmanager
    def _moving(self, function: str, held: Held | None = None) -> Iterator[Running]:
        """The running statistics (those held, if they still are), for a backend to move; inside a turn.

        `_check_updatable` has passed. What was written becomes the state's unless an error is raised.
        """
        if held is None or held is not self._held:
            before, held = held, self._current(function)
            self._check_updatable(function, held)
            if before and before.device != held.device:
                moved = held.arrays["running_mean"]
                raise ValueError(refusal(function, "running_mean", "stay on x's device meanwhile", moved))
        arrays = [held.arrays[name] for name in STATISTICS]
        fresh = [_arrays.empty_vector(a.shape[0], a.dtype, a) if a.library.immutable else None for a in arrays]
        assert self._counters
        assert held.running
        new_mean, new_var = (vector(f.array) if f else old for f, old in zip(fresh, held.running, strict=True))
        if self._counters.device != held.device:
            self._place_counters(arrays[0].device, self._counts())
        counters = self._counters
        if any(fresh):  # whose libraries may refuse them: all of it moves, or nothing
            counters = counters._replace(tracked=counters.tracked.copy(), skipped=counters.skipped.copy())
        momentum, biased = self._options.momentum, self._options.running_variance == "biased"
        yield Running(held.running, (new_mean, new_var), counters.tracked, counters.skipped, momentum, biased)
        changed = {name: output.finish() for name, output in zip(STATISTICS, fresh, strict=True) if output}
        if changed:
            self._arrays, self._counters = self._arrays | changed, counters
        for array, output in zip(arrays, fresh, strict=True):
            if output is None:
                array.library.mark_written(array)

    def _move_to_zero_and_one(self) -> None:
        """An update of weight 1 by two values of mean 0 and variance 1, which nothing counts."""
        place, C = self._place("reset"), self._options.num_features
        count, mean, m2 = (place.from_host(a) for a in (np.array(2), np.zeros(C), np.ones(C)))
        statistics = place.statistics(count, mean, m2, self._options.eps)
        with self._moving("reset") as running:
            uncounted = {name: place.from_host(zeros) for name, zeros in self._no_counts().items()}
            place.update(statistics, running._replace(**uncounted, momentum=1.0, biased=False))

    def _current(self, function: str) -> Held:
        arrays, held = self._arrays, self._held
        if held is None or not (held.headers.unchanged() and (held.fixed or held.is_of(arrays))):
            held = hold(self._describe(arrays, function), function)
            self._keep(held)
        return held

    def _keep(self, held: Held) -> None:
        """Remember the description; not a capsule, which would keep memory from an owner who may give it away."""
        self._held = None if any(array.capsule for array in held.arrays.values()) else held

    def _describe(self, arrays: Mapping[str, Any], function: str) -> dict[str, Array]:
        """The arrays there are, each with the state's number of channels."""
        found = {name: described(a, name, function) for name, a in arrays.items() if a is not None}
        for name, array in found.items():
            if array.shape != (self._options.num_features,):
                rule = f"have shape ({self._options.num_features},), one value per channel"
                raise ValueError(refusal(function, name, rule, array))
        return found


_STATES: weakref.WeakSet[Holding] = weakref.WeakSet()


def _release_locks() -> None:
    """In a forked child: a lock held by a thread that does not exist here would never be released."""
    for state in list(_STATES):
        if not state._lock._is_owned():  # type: ignore[attr-defined]
            state._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks)
