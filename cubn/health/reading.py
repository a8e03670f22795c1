"""What a monitor reads: all layers at one moment."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Int64 = NDArray[np.int64]


class Watched(NamedTuple):
    """One batch norm of those that are recorded."""

    name: str
    num_features: int
    eps: float


class Reading(NamedTuple):
    """All layers at one moment, their channels one after the other."""

    values: Floats
    """Of shape (3, channels): gamma, running mean, running variance."""
    counts: Int64
    """Of shape (2, channels): updates seen, and those that changed nothing."""
    momentum: Floats
    """Of shape (channels,); NaN for the cumulative average."""
