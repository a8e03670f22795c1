"""The rule on running statistics beside those of data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cubn._moments import Moments
from cubn.health.finding import Severity
from cubn.health.layer import Float64, Layer
from cubn.health.rules.measures import (
    FEW_VALUES,
    RECALIBRATE,
    eps_of,
    left_of_the_beginning,
    seldom,
    updates_of,
    values_known,
)
from cubn.health.rules.registry import Channels, Found, Network, rule, statistics

USUAL_KURTOSIS = 10.0
"""Of a channel's values, which nobody has measured: 3 for normal numbers, more behind a ReLU."""

UNLIKELY = 6.0
"""In standard errors: what sampling does not do in any of a network's channels."""

MOVED, MOVED_FAR = 1.0, 4.0
"""In standard deviations of the channel, the unit of the output: statistics lag behind weights that still move, by less
than 1 in networks that train well."""

RATIO, RATIO_FAR = 4.0, 100.0
"""Of variances: outputs that are twice, or ten times, too large or too small."""

MANY = 0.5
"""Share of channels: where more are wrong than not, so is the layer. Those of small variance alone hold for long what
they began with."""


class _Distance(NamedTuple):
    """How far one running statistic is from the data's, channel by channel."""

    what: str
    unit: str
    """Of its size, as it shows in the output."""
    size: Float64
    surprise: Float64
    """In standard errors."""
    limits: tuple[float, float]
    """Sizes from which it is a warning, or an error."""
    began: Channels
    """Where it is no further than what is left of a new layer's 0 and 1 explains."""
    evidence: dict[str, Float64]


@rule("stale")
def stale(layer: Layer, network: Network) -> Iterator[Found]:
    """Running statistics are far from those of given data: by more than sampling explains, and enough to see.

    A running average of weight w errs as (2 - w) / w batches do, of which none is known to have had more than a few
    values: the mean by sigma / sqrt(n), the variance by sqrt((kurtosis - 1) / n) of itself.
    """
    moments = layer.moments
    if moments is None or moments.count < 2 or moments.num_features != layer.num_features:
        return
    n = 1 / (1 / values_known(layer) + 1 / int(moments.count))
    for mean, var in statistics(layer):
        for distance in (_of_means(layer, mean, moments, n), _of_variances(layer, var, moments, n)):
            yield from _far(layer, distance)


def _of_means(layer: Layer, mean: Float64, moments: Moments, n: float) -> _Distance:
    shift = np.abs(mean - moments.mean)
    error = np.sqrt(moments.var() / n)
    return _Distance(
        "running_mean is far from the data's mean",
        "shift in σ",
        shift / np.sqrt(moments.var() + eps_of(layer)),
        np.where(shift > 0, shift / error, 0.0),
        (MOVED, MOVED_FAR),
        shift <= 2 * left_of_the_beginning(layer) * np.abs(moments.mean),
        {"running_mean": mean, "mean of the data": moments.mean},
    )


def _of_variances(layer: Layer, var: Float64, moments: Moments, n: float) -> _Distance:
    truth, eps = moments.var(), eps_of(layer)
    ratio = (var + eps) / (truth + eps)
    error = np.sqrt((np.maximum(USUAL_KURTOSIS, _kurtosis(moments)) - 1) / n)
    unknown = (error >= 1) | ((ratio < 1) & seldom(layer))
    return _Distance(
        "running_var is far from the data's variance",
        "ratio",
        np.maximum(ratio, 1 / ratio),
        np.where(unknown, 0.0, np.abs(np.log(ratio)) / error),
        (RATIO, RATIO_FAR),
        (var > truth) & (var - truth <= 2 * left_of_the_beginning(layer)),
        {"running_var": var, "variance of the data": truth},
    )


def _far(layer: Layer, distance: _Distance) -> Iterator[Found]:
    """What is both unlikely and large enough to see."""
    low, high = distance.limits
    wrong = (distance.surprise > UNLIKELY) & (distance.size > low)
    began = wrong & distance.began
    moved = wrong & ~began
    worst = moved if moved.mean() > MANY else moved & (distance.size > high)
    by_severity: list[tuple[Severity, Channels]] = [
        ("error", worst),
        ("warning", moved & ~worst),
        ("warning" if began.mean() > MANY else "info", began),
    ]
    for severity, channels in by_severity:
        if channels.any():
            numbers = {distance.unit: distance.size, "standard errors": distance.surprise, **distance.evidence}
            yield Found(
                severity,
                distance.what,
                channels,
                {name: values[channels] for name, values in numbers.items()},
                f"{updates_of(layer)} updates, after which statistics still hold some of what they began with"
                if channels is began
                else "data of another domain, weights that changed since, or a momentum that follows them too slowly",
                RECALIBRATE,
            )


def _kurtosis(moments: Moments) -> Float64:
    """Of each channel, by how much the variances of the Moments' own parts differ; 1, the least, where there is one.

    The variance of n values varies by (kurtosis - 1) / n of its square.
    """
    nodes = moments._nodes
    parts = nodes.count >= FEW_VALUES
    if parts.sum() < 2:
        return np.ones(moments.num_features)
    counts = nodes.count[parts, None].astype(np.float64)
    variances = nodes.second[parts] / counts
    mean = (counts * variances).sum(axis=0) / counts.sum()
    spread = (counts * (variances / mean - 1) ** 2).sum(axis=0) / (len(counts) - 1)
    return np.asarray(1 + np.where(np.isfinite(spread), spread, 0))
