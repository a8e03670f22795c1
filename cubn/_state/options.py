"""The numbers and words of a state: what each may be."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays
from cubn._arguments import as_int, on_host, one_of
from cubn._types import COUNTS, Update
from cubn.errors import message, quoted
from cubn.typing import DTypeName, RunningVariance

STATE = "BatchNormState"
RUNNING_VARIANCES: tuple[RunningVariance, ...] = get_args(RunningVariance)
DTYPES: tuple[DTypeName, ...] = get_args(DTypeName)

_MOST_CHANNELS = 1 << 48  # more have no addresses
_MOST_BATCHES = 1 << 62  # so that no counter wraps


class Options(NamedTuple):
    """What a state holds besides arrays and counters."""

    num_features: int
    eps: float
    momentum: float | None
    channel_axis: int
    running_variance: RunningVariance

    @property
    def how_to_update(self) -> Update:
        """How running statistics move."""
        return Update(self.momentum, self.running_variance == "biased")


OPTIONS = Options._fields


def checked_options(
    num_features: int, eps: float, momentum: float | None, channel_axis: int, running_variance: RunningVariance
) -> Options:
    """Options that a state can have. Whether momentum is a weight is asked where it is given or used as one."""
    channels = as_int(num_features, "num_features")
    if not 1 <= channels < _MOST_CHANNELS:
        raise ValueError(message("num_features", "be 1 or more and less than 2**48", quoted(channels)))
    return Options(
        channels,
        checked_eps(eps),
        checked_momentum(momentum, used=False),
        checked_axis(channel_axis),
        checked_variance(running_variance),
    )


def checked_eps(eps: float) -> float:
    """eps as a number that can be added to a variance."""
    number = as_float(eps, "eps")
    if not 0 < number < math.inf:
        raise ValueError(message("eps", "be positive and finite", number))
    return number


def checked_momentum(momentum: float | None, *, used: bool = True) -> float | None:
    """momentum as a number; as a weight, if it is used."""
    if momentum is None:
        return None
    number = as_float(momentum, "momentum")
    if used and not 0 <= number <= 1:
        raise ValueError(message("momentum", "be None or from 0 to 1, the weight of the new value", number))
    return number


def checked_weight(weight: float) -> float:
    """weight as a share of two."""
    number = as_float(weight, "weight")
    if not 0 <= number <= 1:
        raise ValueError(message("weight", "be from 0 to 1", number))
    return number


def checked_axis(channel_axis: int) -> int:
    """channel_axis as an axis that some array has."""
    axis = as_int(channel_axis, "channel_axis")
    if not -_MOST_CHANNELS < axis < _MOST_CHANNELS:
        raise ValueError(message("channel_axis", "be an axis of x", quoted(axis)))
    return axis


def checked_variance(running_variance: RunningVariance) -> RunningVariance:
    """Which variance running_var averages."""
    return one_of(RUNNING_VARIANCES, running_variance, "running_variance")


def counts(values: Any, name: str, channels: int) -> NDArray[np.int64]:
    """A number, or one for each channel in an array of any library, as a new array of whole numbers."""
    if isinstance(values, np.generic):
        values = np.asarray(values)
    if isinstance(values, int) and not isinstance(values, bool):
        found = np.array(values, np.int64 if abs(values) < _MOST_BATCHES else object)
    elif hasattr(type(values), "__dlpack__"):
        array = _arrays.describe(values, name, COUNTS)
        found = on_host(array)
    else:
        remedy = "Pass an int, or an array of int64."
        raise TypeError(message(name, "be a count, or an array of one per channel", quoted(values), remedy))
    if found.shape not in ((), (channels,)):
        rule = f"be a number or have shape ({channels},), one count per channel"
        raise ValueError(message(name, rule, "an array", shape=found.shape))
    if wrong := [value for value in found.reshape(-1).tolist() if not 0 <= value < _MOST_BATCHES]:
        raise ValueError(message(name, "be 0 or more and less than 2**62", quoted(wrong[0])))
    return np.broadcast_to(found, channels).astype(np.int64)


def check_counts(tracked: NDArray[np.int64], skipped: NDArray[np.int64]) -> None:
    """Only updates that were seen can have been skipped."""
    if (more := np.flatnonzero(skipped > tracked)).size:
        c = more[0]
        got = f"{skipped[c]} skipped of {tracked[c]} tracked in channel {c}"
        remedy = "reset(statistics=False) sets both to 0."
        raise ValueError(message("tracked", "be at least skipped", got, remedy))


def as_float(value: float, argument: str) -> float:
    """A real number of any kind as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message(argument, "be a real number", quoted(value)))
    try:
        return float(value)
    except OverflowError:
        raise ValueError(message(argument, "be a number that a float can hold", quoted(value))) from None
