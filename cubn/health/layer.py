"""One batch norm as rules see it: its arrays in NumPy, whatever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cubn._moments import Moments
from cubn.typing import RunningVariance

Float64 = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters, running statistics, options and counters of one batch norm; None is what is not known.

    Attributes
    ----------
    name : str
        As in the model: a module's path.
    num_features : int
        Channels, C.
    gamma, beta, running_mean, running_var : float64 array of shape (C,), or None
        Widened from what they are stored in; see `dtypes`.
    dtypes : mapping of str to str
        By the names of these arrays, the type they are stored in: "float16", "bfloat16", "float32", "float64".
    eps : float or None
    momentum : float, "cumulative" or None
        The weight of the new value (PyTorch's sense). None: not known.
    running_variance : {"unbiased", "biased"} or None
    tracked, skipped : int64 array of shape (C,), or None
        Updates seen, and those that changed nothing.
    moments : Moments or None
        Of the layer's inputs, to compare the running statistics with.
    """

    name: str
    num_features: int
    gamma: Float64 | None = None
    beta: Float64 | None = None
    running_mean: Float64 | None = None
    running_var: Float64 | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    eps: float | None = None
    momentum: float | Literal["cumulative"] | None = None
    running_variance: RunningVariance | None = None
    tracked: Counts | None = None
    skipped: Counts | None = None
    moments: Moments | None = None
