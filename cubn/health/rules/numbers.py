"""Rules on values that are no numbers, or no variances."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn._state.arrays import ARRAYS
from cubn.health.layer import Float64, Layer
from cubn.health.rules.measures import RECALIBRATE
from cubn.health.rules.registry import Found, Network, rule


@rule("non-finite")
def non_finite(layer: Layer, network: Network) -> Iterator[Found]:
    """A parameter or a running statistic is NaN or infinite: so is every output of the channel."""
    for name in ARRAYS:
        values: Float64 | None = getattr(layer, name)
        if values is None or (finite := np.isfinite(values)).all():
            continue
        is_parameter = name in ("gamma", "beta")
        yield Found(
            "error",
            f"{name} is not finite",
            ~finite,
            {name: values[~finite]},
            "training diverged, or a gradient overflowed in 16 bits"
            if is_parameter
            else "a batch with an inf or a NaN went into the running statistics, which keep it for ever",
            "load the last checkpoint whose parameters are finite" if is_parameter else RECALIBRATE,
        )


@rule("negative-variance")
def negative_variance(layer: Layer, network: Network) -> Iterator[Found]:
    """A running variance is below 0, which no set of numbers has: outputs are NaN, or too large."""
    var = layer.running_var
    if var is not None and (wrong := var < 0).any():
        yield Found(
            "error",
            "running_var is negative",
            wrong,
            {"running_var": var[wrong]},
            "E[x²] − E[x]² in float32, a difference of averaged weights, or an optimizer that updates buffers",
            RECALIBRATE,
        )
