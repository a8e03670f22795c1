"""Rules on how much channels are amplified."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn.health.finding import Severity
from cubn.health.layer import Float64, Layer
from cubn.health.rules.measures import RECALIBRATE, dead_channels, eps_of, gains
from cubn.health.rules.registry import Channels, Found, Network, rule

FAR = 30.0
"""Times the layer's median: in training runs on the digits no channel's outputs are twice that, and weight decay, which
they do not have, makes most of a layer small before the rest."""

FAR_IN_SPREADS = 6.0
"""The same in standard deviations of the logarithm: a layer whose gains are spread has some that are far."""

LEAST_SPREAD = 0.1
"""Of a logarithm: of a layer whose gains are all alike, as they are where training begins."""

EXPLODED = 10.0
"""Times what is far: no training recovers from that by itself."""

TO_SIGMA = 1.4826
"""From the median absolute deviation to the standard deviation of normal numbers."""


@rule("gain")
def exploding_gain(layer: Layer, network: Network) -> Iterator[Found]:
    """|gamma| / sqrt(var + eps) is far above that of the layer's other channels.

    Where gamma does it, outputs are as large: a warning, or an error if they are hundreds of times too large. Where a
    small variance does it, they are not for as long as the variance is right, which the rule `stale` looks at; that is
    worth knowing. Variances below eps are other rules'.
    """
    var = layer.running_var
    if var is None:
        return
    gain = gains(layer)
    output = np.where(dead_channels(layer), np.nan, gain * np.sqrt(var))
    above = _times_what_is_far(output)
    by_variance = (_times_what_is_far(np.where(var < eps_of(layer), np.nan, gain)) > 1) & ~(above > 1)
    by_severity: list[tuple[Severity, Channels, str]] = [
        ("error", above > EXPLODED, "the gain |gamma|/√(var + eps) exploded, and outputs with it"),
        ("warning", (above > 1) & (above <= EXPLODED), "the gain |gamma|/√(var + eps) is far above the layer's others"),
        ("info", by_variance, "the variance is small, and the gain |gamma|/√(var + eps) far above the layer's others"),
    ]
    for severity, wrong, what in by_severity:
        if wrong.any():
            by_gamma = severity != "info"
            yield Found(
                severity,
                what,
                wrong,
                {
                    "gain": gain[wrong],
                    "median of the layer": float(np.median(gain[np.isfinite(gain)])),
                    "running_var": var[wrong],
                },
                "a learning rate that is too high for gamma, or a gradient that exploded"
                if by_gamma
                else "inputs that are seldom not constant, or a channel that is dying",
                "lower the learning rate of gamma, or clip its gradient" if by_gamma else RECALIBRATE,
            )


def _times_what_is_far(values: Float64) -> Float64:
    """By how much values are above what is far from their median, by their logarithms; NaN where there is none."""
    counted = np.isfinite(values) & (values > 0)
    times = np.full(values.shape, np.nan)
    if counted.any():
        logs = np.log(values[counted])
        median = np.median(logs)
        spread = max(TO_SIGMA * float(np.median(np.abs(logs - median))), LEAST_SPREAD)
        times[counted] = np.exp(logs - median - max(np.log(FAR), FAR_IN_SPREADS * spread))
    return times
