"""Rules on the values of parameters and running statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn._state.arrays import ARRAYS
from cubn.health.finding import Severity
from cubn.health.layer import Float64, Layer
from cubn.health.rules.registry import Channels, Found, Network, rule

USUAL_EPS = 1e-5
"""Where a layer's own is not known: the usual one of PyTorch, Flax and cubn."""

DEAD = 1e-3
"""Of eps: with a variance below this, more than 99.9 % of what divides a channel is eps. Its values were constant."""

MANY = 0.5
"""Share of a layer's channels: constant inputs, and units that a ReLU switched off, leave most of a healthy layer."""

FAR = np.log(100.0)
"""Of a logarithm: healthy gains of one layer stay within a factor of 100 of their median, by what was measured."""

FAR_IN_SPREADS = 8.0
"""In standard deviations, estimated by the median absolute deviation: a layer with wide gains may have wider ones."""

LEAST_SPREAD = 0.1
"""Of a logarithm: of a layer whose gains are all alike, as they are where training begins."""

VISIBLE = 0.01
"""Noise in an output, where 1 is what batch norm aims at."""

ROUNDING = 2.0**-24
"""Of a float32 number, relative to it."""

TO_SIGMA = 1.4826
"""From the median absolute deviation to the standard deviation of normal numbers."""

RECALIBRATE = "cubn.recalibrate(model, batches)"


def eps_of(layer: Layer) -> float:
    return USUAL_EPS if layer.eps is None else layer.eps


def dead_channels(layer: Layer) -> Channels:
    """Whose variance is nothing beside eps."""
    assert layer.running_var is not None
    return (layer.running_var >= 0) & (layer.running_var < DEAD * eps_of(layer))


def _subnormal(var: Float64) -> Channels:
    return (var > 0) & (var < np.finfo(np.float32).tiny)


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


@rule("subnormal-variance")
def subnormal_variance(layer: Layer, network: Network) -> Iterator[Found]:
    """A running variance is below the smallest normal float32 number: hundreds of batches had no variance at all."""
    var = layer.running_var
    if var is None:
        return
    wrong = _subnormal(var)
    if wrong.any():
        yield Found(
            _by_share(wrong),
            "running_var is subnormal",
            wrong,
            {"running_var": var[wrong], "eps": eps_of(layer)},
            "the channel was constant in every batch of a long time: dead inputs, or weights that decayed to 0; "
            "should it come to life, it is amplified by 1/√eps",
            RECALIBRATE,
        )


@rule("dead")
def dead(layer: Layer, network: Network) -> Iterator[Found]:
    """A running variance is far below eps: the channel was constant.

    Constant inputs and units behind a ReLU do that in healthy networks. It is a warning where most channels of a layer
    are dead, or where rounding of the inputs alone is amplified to something visible.
    """
    var, eps = layer.running_var, eps_of(layer)
    if var is None:
        return
    wrong = dead_channels(layer) & ~_subnormal(var)
    cause = "inputs that are constant, dead units before it, or weights that decayed to 0"
    if layer.running_mean is not None:
        noise = np.abs(layer.running_mean) * ROUNDING * gain(layer)
        if (noisy := dead_channels(layer) & (noise > VISIBLE)).any():
            yield Found(
                "warning",
                "the channel is constant, and its rounding is amplified",
                noisy,
                {
                    "running_mean": layer.running_mean[noisy],
                    "gain": gain(layer)[noisy],
                    "noise of the output": noise[noisy],
                },
                f"{cause}; and an eps that is small beside the square of its mean's rounding",
                "bn.eps = 1e-5",
            )
            wrong &= ~noisy
    if wrong.any():
        yield Found(
            _by_share(wrong),
            "the channel is constant: running_var is nothing beside eps",
            wrong,
            {"running_var": var[wrong], "eps": eps},
            cause,
            "remove the channels, or lower weight decay and learning rate before they die",
        )


@rule("collapsing")
def collapsing(layer: Layer, network: Network) -> Iterator[Found]:
    """A running variance fell below eps, far from the layer's others: the channel is about to die."""
    var, eps = layer.running_var, eps_of(layer)
    if var is None or not (eps > 0):
        return
    living = np.isfinite(var) & (var > 0) & ~dead_channels(layer)
    if not living.any():
        return
    median = float(np.median(var[living]))
    wrong = living & (var < eps) & (var * np.exp(FAR) < median)
    if wrong.any():
        yield Found(
            _by_share(wrong),
            "running_var is below eps, and far below the layer's others",
            wrong,
            {"running_var": var[wrong], "median of the layer": median, "eps": eps},
            "inputs that are seldom not constant, or a channel that is dying",
            "watch it: cubn.health.Monitor",
        )


def gain(layer: Layer) -> Float64:
    """|gamma| / sqrt(var + eps): by how much a channel's inputs are amplified."""
    assert layer.running_var is not None
    gamma = np.ones(layer.num_features) if layer.gamma is None else np.abs(layer.gamma)
    with np.errstate(all="ignore"):
        return np.asarray(gamma / np.sqrt(layer.running_var + eps_of(layer)))


@rule("gain")
def exploding_gain(layer: Layer, network: Network) -> Iterator[Found]:
    """|gamma| / sqrt(var + eps) is out of proportion to the layer's other channels.

    It is a warning where gamma does it: then the outputs are large, too. Where a small variance does, they are not, for
    as long as the variance is right; the rule `stale` says whether it is. Dead channels are another rule's.
    """
    var = layer.running_var
    if var is None:
        return
    gains = gain(layer)
    with np.errstate(all="ignore"):
        outputs = gains * np.sqrt(var)
    large_outputs = _far_above(outputs, outputs > 0)
    living = ~dead_channels(layer)
    large = _far_above(gains, living & (gains > 0)) & ~large_outputs
    by_gamma = "gamma grew out of proportion: a learning rate that is too high for it, or a gradient that exploded"
    by_variance = "a variance that sank: inputs that are seldom not constant, or a channel that is dying"
    for wrong, is_harmful in ((large_outputs, True), (large, False)):
        if wrong.any():
            yield Found(
                "warning" if is_harmful else "info",
                f"the gain |gamma|/√(var+eps) is out of proportion{', and so are the outputs' if is_harmful else ''}",
                wrong,
                {
                    "gain": gains[wrong],
                    "median of the layer": float(np.median(gains[np.isfinite(gains)])),
                    "running_var": var[wrong],
                },
                by_gamma if is_harmful else by_variance,
                "lower the learning rate of gamma, or clip its gradient" if is_harmful else RECALIBRATE,
            )


def _far_above(values: Float64, among: Channels) -> Channels:
    """Which values are far above the median of those that count, by their logarithms."""
    counted = among & np.isfinite(values)
    above = np.zeros(values.shape, np.bool_)
    if not counted.any():
        return above
    logs = np.log(values[counted])
    median = np.median(logs)
    spread = max(TO_SIGMA * float(np.median(np.abs(logs - median))), LEAST_SPREAD)
    above[counted] = logs - median > max(FAR, FAR_IN_SPREADS * spread)
    return above


def _by_share(wrong: Channels) -> Severity:
    """A warning where most channels of a layer are concerned; one of one is a layer's own affair."""
    return "warning" if wrong.size > 1 and wrong.mean() > MANY else "info"
