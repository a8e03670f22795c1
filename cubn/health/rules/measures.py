"""What several rules ask of a layer, channel by channel."""

from __future__ import annotations

import math

import numpy as np

from cubn.health.layer import Float64, Layer
from cubn.health.rules.registry import Channels, weight

RECALIBRATE = "cubn.recalibrate(model, batches)"

USUAL_EPS = 1e-5
"""Where a layer's own is not known: the usual one of PyTorch, Flax and cubn."""

DEAD = 1e-3
"""Of eps: with a variance below this, more than 99.9 % of what divides a channel is eps. Its values were constant."""

USUAL_MOMENTUM = 0.1
"""Where a layer's own is not known: the usual one of PyTorch."""

FEW_VALUES = 8
"""In each batch that running statistics saw, where nobody has counted: the least that people train with, so that no
more is concluded than is known."""

SELDOM = 5
"""Of the values that a running average knows: what occurs more often has been seen."""

SMALL = 0.1
"""Of the median variance of a layer: what a channel with so few values that are not its usual one has at most."""


def eps_of(layer: Layer) -> float:
    """The layer's eps, or the usual one."""
    return USUAL_EPS if layer.eps is None else layer.eps


def dead_channels(layer: Layer) -> Channels:
    """Whose running variance is nothing beside eps."""
    assert layer.running_var is not None
    return (layer.running_var >= 0) & (layer.running_var < DEAD * eps_of(layer))


def gains(layer: Layer) -> Float64:
    """|gamma| / sqrt(var + eps): by how much a channel's inputs are amplified."""
    assert layer.running_var is not None
    gamma = np.ones(layer.num_features) if layer.gamma is None else np.abs(layer.gamma)
    return np.asarray(gamma / np.sqrt(layer.running_var + eps_of(layer)))


def alive_in_data(layer: Layer) -> Channels:
    """Whose variance in the layer's Moments is more than eps; no channels without Moments, none that is seldom."""
    if layer.moments is None or layer.moments.num_features != layer.num_features:
        return np.zeros(layer.num_features, np.bool_)
    return (layer.moments.var() > eps_of(layer)) & ~seldom(layer)


def constant_in_data(layer: Layer) -> Channels:
    """Whose values in the layer's Moments are constant, or all but a few; no channels without Moments."""
    if layer.moments is None or layer.moments.num_features != layer.num_features:
        return np.zeros(layer.num_features, np.bool_)
    return (layer.moments.var() < DEAD * eps_of(layer)) | seldom(layer)


def seldom(layer: Layer) -> Channels:
    """Which may be constant but for values too few for a running average to know their variance, by the Moments.

    Of values of which a share p is not 0, mean² / E[x²] is at most p.
    """
    assert layer.moments is not None
    mean, var = layer.moments.mean, layer.moments.var()
    share = mean**2 / (var + mean**2)
    return (share * values_known(layer) < SELDOM) & (var < SMALL * np.median(var))


def values_known(layer: Layer) -> float:
    """How many values running statistics know of at the least: a running average of weight w, (2 - w) / w batches."""
    updates = updates_of(layer)
    if layer.momentum == "cumulative":
        return FEW_VALUES * float(updates or 1)
    momentum = weight(layer)
    share = USUAL_MOMENTUM if momentum is None else min(max(momentum, 1e-6), 1.0)
    return FEW_VALUES * min((2 - share) / share, updates or math.inf)


def updates_of(layer: Layer) -> int | None:
    """Updates that moved the statistics, of the channel that had the most; None where nobody counted."""
    if layer.tracked is None or not layer.tracked.size:
        return None
    return int((layer.tracked - (0 if layer.skipped is None else layer.skipped)).max())


def left_of_the_beginning(layer: Layer) -> float:
    """What the 0 and 1 of a new layer still weigh in its running statistics; 0 where that is not known."""
    updates, momentum = updates_of(layer), weight(layer)
    if updates is None or momentum is None or not 0 <= momentum <= 1:
        return 0.0
    return float((1 - momentum) ** updates)
