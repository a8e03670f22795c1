"""A state's attributes, as they are read and assigned: arrays, counters and options."""

from __future__ import annotations

from typing import Any, Self, overload

from cubn._state.holding import Holding
from cubn._state.options import STATE, checked_axis, checked_eps, checked_momentum, checked_variance
from cubn.errors import reporting_as
from cubn.typing import RunningVariance, SupportsDLPack


class _Attribute:
    """An attribute whose array is checked and looked at when it is assigned."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, state: None, owner: type) -> Self: ...

    @overload
    def __get__(self, state: Attributes, owner: type) -> Any: ...

    def __get__(self, state: Attributes | None, owner: type) -> Any:
        return self if state is None else state._arrays[self._name]

    def __set__(self, state: Attributes, array: SupportsDLPack | None) -> None:
        state._set_arrays({self._name: array})


class _Counter(_Attribute):
    """A counter: a copy is taken of what is assigned, and given to who reads it."""

    def __get__(self, state: Attributes | None, owner: type) -> Any:
        if state is None:
            return self
        if state._counters is None:
            return None
        found = state._counts()[self._name]
        found.flags.writeable = False
        return found

    def __set__(self, state: Attributes, counts: Any) -> None:
        state._set_counters({self._name: counts})


class Attributes(Holding):
    """Whatever is assigned is checked against what else the state has."""

    __slots__ = ()

    gamma = _Attribute()
    beta = _Attribute()
    running_mean = _Attribute()
    running_var = _Attribute()
    tracked = _Counter()
    skipped = _Counter()

    @property
    def num_features(self) -> int:
        """Channels, C."""
        return self._options.num_features

    @property
    def eps(self) -> float:
        """Added to the variance."""
        return self._options.eps

    @eps.setter
    def eps(self, eps: float) -> None:
        with reporting_as(STATE):
            self._set_options(eps=checked_eps(eps))

    @property
    def momentum(self) -> float | None:
        """Weight of the new value in the running statistics; None for the cumulative average."""
        return self._options.momentum

    @momentum.setter
    def momentum(self, momentum: float | None) -> None:
        with reporting_as(STATE):
            self._set_options(momentum=checked_momentum(momentum, used=self._counters is not None))

    @property
    def channel_axis(self) -> int:
        """The channels' axis in x."""
        return self._options.channel_axis

    @channel_axis.setter
    def channel_axis(self, channel_axis: int) -> None:
        with reporting_as(STATE):
            self._set_options(channel_axis=checked_axis(channel_axis))

    @property
    def running_variance(self) -> RunningVariance:
        """Which variance of a batch running_var averages: "unbiased" or "biased"."""
        return self._options.running_variance

    @running_variance.setter
    def running_variance(self, running_variance: RunningVariance) -> None:
        with reporting_as(STATE):
            self._set_options(running_variance=checked_variance(running_variance))
