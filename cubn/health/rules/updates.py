"""Rules on how running statistics were updated: never, too seldom, not lately, and how often by the counters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cubn._moments import Moments
from cubn.health.layer import Float64, Layer
from cubn.health.rules.registry import Channels, Found, Network, rule, statistics, untouched
from cubn.health.rules.values import RECALIBRATE, eps_of

SKIPPED_SOME, SKIPPED_MANY = 0.05, 0.5
"""Of a channel's updates. A loss scale that is being found overflows in a few steps of thousands."""

LATELY = 2.0
"""By how much the latest updates must be skipped more often than all of them, to say that it grows."""

USUAL_MOMENTUM = 0.1
"""Where a layer's own is not known: the usual one of PyTorch."""

USUAL_BATCH = 32
"""Values in each batch that running statistics saw, which nobody has counted: few, so that little is concluded."""

USUAL_KURTOSIS = 10.0
"""Of a channel's values, which nobody has measured: 3 for normal numbers, more behind a ReLU."""

UNLIKELY = 6.0
"""In standard errors: what sampling does not do in any of a network's channels."""

MOVED, MOVED_FAR = 1.0, 4.0
"""In standard deviations of the channel, the unit of the output: statistics lag behind weights that still move, by less
than 1 in networks that train well."""

RATIO, RATIO_FAR = 4.0, 100.0
"""Of variances: outputs that are twice, or ten times, too large or too small."""

EXPECTED_BATCHES = 3.0
"""Of 1 / momentum: after so many updates 5 % are left of the 0 and 1 that running statistics begin with."""


@rule("never-updated")
def never_updated(layer: Layer, network: Network) -> Iterator[Found]:
    """Running statistics are still 0 and 1.

    In a new model they are bound to be. It is an error where gamma or beta were trained, updates were counted, or other
    channels or other layers have moved.
    """
    for mean, var in statistics(layer):
        still = (mean == 0) & (var == 1)
        if not still.any():
            return
        evidence = {"running_mean": 0.0, "running_var": 1.0, "tracked": "unknown"}
        if layer.tracked is not None:
            evidence["tracked"] = int(layer.tracked.max())
        if not still.all():
            what = "running statistics are still 0 and 1, and those of other channels are not"
            yield Found("error", what, still, evidence, "channels that no batch ever reached", RECALIBRATE)
        elif trained := _signs_of_training(layer, network):
            cause = "training in eval mode, a copy of the module that was updated and thrown away, or weights loaded "
            cause += "without their buffers"
            what = f"running statistics are still 0 and 1, but {trained}"
            yield Found("error", what, still, evidence, _why(layer) or cause, RECALIBRATE)
        else:
            what = "running statistics are still 0 and 1: the layer was never trained"
            yield Found("info", what, still, evidence, "a new model", RECALIBRATE)


def _signs_of_training(layer: Layer, network: Network) -> str:
    """What shows that a layer whose statistics never moved has been trained; empty if nothing does."""
    if layer.tracked is not None and (layer.tracked > 0).any():
        return "updates were counted"
    if layer.gamma is not None and np.unique(layer.gamma).size > 1:
        return "gamma was trained"
    if layer.beta is not None and (layer.beta != 0).any():
        return "beta was trained"
    if network.updated:
        return "those of other layers are not"
    return ""


def _why(layer: Layer) -> str:
    if layer.momentum == 0:
        return "a momentum of 0, which moves nothing"
    if layer.tracked is not None and layer.skipped is not None and (layer.skipped >= layer.tracked).all():
        return "every update was skipped: no batch was finite" if (layer.tracked > 0).all() else ""
    return ""


@rule("skipped")
def skipped_updates(layer: Layer, network: Network) -> Iterator[Found]:
    """Updates changed nothing, since a batch's statistics were not finite, or it had one value per channel."""
    if layer.tracked is None or layer.skipped is None or not layer.skipped.any():
        return
    share = layer.skipped / np.maximum(layer.tracked, 1)
    lately = layer.skipped_lately
    grows = np.zeros(share.shape, np.bool_) if lately is None else lately > np.maximum(LATELY * share, SKIPPED_SOME)
    many = share >= SKIPPED_MANY
    some = ~many & ((share >= SKIPPED_SOME) | grows)
    few = ~many & ~some & (layer.skipped > 0)
    cause = "batches with an inf or a NaN, as of 16-bit activations that overflow, or batches of one value per channel"
    remedy = "find the first one: assert numpy.isfinite(x).all()"
    for wrong, is_more in ((many, "error"), (some, "warning"), (few, "info")):
        if wrong.any():
            what = (
                "running statistics were left as they were in many updates"
                if is_more == "error"
                else ("some updates left running statistics as they were")
            )
            evidence = {"share": share[wrong], "skipped": layer.skipped[wrong], "tracked": layer.tracked[wrong]}
            if lately is not None:
                evidence["share lately"] = lately[wrong]
            more = ", lately more of them" if (grows & wrong).any() else ""
            yield Found(is_more, what + more, wrong, evidence, cause, remedy)


@rule("lost-counts")
def lost_counts(layer: Layer, network: Network) -> Iterator[Found]:
    """Counts of updates do not fit the statistics, or differ among channels or layers.

    A cumulative average weighs the next batch by the count: with a count that was lost, one batch replaces all before.
    """
    moved = untouched(layer) is False
    is_cumulative = layer.momentum == "cumulative"
    remedy = "bn.num_batches_tracked.fill_(n), or state.tracked = n: the updates there were"
    if layer.tracked is None:
        if moved and network.counts:
            yield Found(
                "error" if is_cumulative else "info",
                "the layer has no count of its updates, and others have",
                evidence={"layers with a count": len(network.counts)},
                cause="a checkpoint of an older version, or one that lost entries",
                remedy=remedy,
            )
        return
    nothing = layer.tracked == 0
    for mean, var in statistics(layer):
        if (lost := nothing & ((mean != 0) | (var != 1))).any():
            yield Found(
                "error" if is_cumulative else "warning",
                "no updates are counted, but the running statistics have moved",
                lost,
                {"tracked": layer.tracked[lost]},
                "statistics that were copied, converted or loaded without their counter",
                remedy,
            )
            return
    if np.unique(layer.tracked).size > 1:
        usual = np.median(layer.tracked)
        other = layer.tracked != usual
        yield Found(
            "warning" if is_cumulative else "info",
            "channels count different numbers of updates",
            other,
            {"tracked": layer.tracked[other], "median of the layer": float(usual)},
            "statistics that were not finite and began anew, or states that were put together",
        )
    elif moved and len(counts := set(network.counts.values())) > 1:
        most = max(counts)
        if 0 < layer.tracked[0] < most / 2:
            yield Found(
                "info",
                "the layer counts less than half the updates of another",
                evidence={"tracked": int(layer.tracked[0]), "most of the others": most},
                cause="a layer that was frozen, added later, or is not used in every step",
            )


# --- running statistics beside Moments ------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """What is known of how surely running statistics and Moments can be compared."""

    values: float
    """That one running statistic and the Moments are worth together."""
    kurtosis: Float64


@rule("stale")
def stale(layer: Layer, network: Network) -> Iterator[Found]:
    """Running statistics are far from those of given data: by more than sampling explains, and enough to see.

    A running average of weight w has the error of about (2 - w) / w batches, of which none is known to have had more
    than a few values. The mean's error is sigma / sqrt(n), and the variance's sqrt((kurtosis - 1) / n) of itself.
    """
    moments = layer.moments
    if moments is None or moments.count < 2 or moments.num_features != layer.num_features:
        return
    sample = _sample(layer, moments)
    eps = eps_of(layer)
    with np.errstate(all="ignore"):
        truth = moments.var() + eps
        for mean, var in statistics(layer):
            shift = np.abs(mean - moments.mean) / np.sqrt(truth)
            error = np.sqrt(np.maximum(moments.var(), 0) / truth / sample.values)
            yield from _far(
                layer,
                ("running_mean is far from the data's mean", "shift in σ", "shift in standard errors"),
                shift,
                np.where(shift > 0, shift / error, 0.0),
                (MOVED, MOVED_FAR),
                {"running_mean": mean, "mean": moments.mean},
            )
            ratio = np.maximum((var + eps) / truth, truth / (var + eps))
            relative = np.sqrt((sample.kurtosis - 1) / sample.values)
            surprise = np.where(relative < 1, np.log(ratio) / relative, 0.0)
            yield from _far(
                layer,
                ("running_var is far from the data's variance", "ratio", "log ratio in standard errors"),
                ratio,
                surprise,
                (RATIO, RATIO_FAR),
                {"running_var": var, "var": moments.var()},
            )


def _far(
    layer: Layer,
    words: tuple[str, str, str],
    size: Float64,
    surprise: Float64,
    limits: tuple[float, float],
    evidence: dict[str, Float64],
) -> Iterator[Found]:
    """What is both unlikely and large enough to see."""
    what, of_size, of_surprise = words
    wrong = (surprise > UNLIKELY) & (size > limits[0])
    worst = wrong & (size > limits[1])
    for severity, channels in (("error", worst), ("warning", wrong & ~worst)):
        if channels.any():
            numbers = {of_size: size, of_surprise: surprise, **evidence}
            yield Found(
                severity,
                what,
                channels,
                {name: value[channels] for name, value in numbers.items()},
                _why_stale(layer),
                RECALIBRATE,
            )


def _why_stale(layer: Layer) -> str:
    updates = _updates(layer)
    if isinstance(layer.momentum, float) and updates is not None and updates * layer.momentum < EXPECTED_BATCHES:
        return f"{updates} updates at a momentum of {layer.momentum:g}: the statistics still hold what they began with"
    return "data of another domain, weights that changed since, or a momentum that follows them too slowly"


def _updates(layer: Layer) -> int | None:
    """That moved the statistics; None where nobody counted."""
    if layer.tracked is None or not layer.tracked.size:
        return None
    skipped = 0 if layer.skipped is None else layer.skipped
    return int((layer.tracked - skipped).max())


def _sample(layer: Layer, moments: Moments) -> _Sample:
    """How many values stand behind the running statistics and the Moments, and how heavy their tails are."""
    updates = _updates(layer)
    if layer.momentum == "cumulative":
        batches = float(updates or 1)
    else:
        weight = USUAL_MOMENTUM if layer.momentum is None else min(max(layer.momentum, 1e-6), 1.0)
        batches = (2 - weight) / weight
        if updates:
            batches = min(batches, updates)
    running = batches * min(USUAL_BATCH, int(moments.count))
    values = 1 / (1 / running + 1 / int(moments.count))
    return _Sample(values, np.maximum(USUAL_KURTOSIS, _kurtosis(moments)))


def _kurtosis(moments: Moments) -> Float64:
    """Of each channel, by how much the variances of the Moments' own parts differ; 1, the least, where there is one.

    The variance of n values varies by (kurtosis - 1) / n of its square.
    """
    nodes = moments._nodes
    parts = nodes.count >= USUAL_BATCH
    if parts.sum() < 2:
        return np.ones(moments.num_features)
    counts = nodes.count[parts, None].astype(np.float64)
    variances = nodes.second[parts] / counts
    mean = (counts * variances).sum(axis=0) / counts.sum()
    with np.errstate(all="ignore"):
        spread = (counts * (variances / mean - 1) ** 2).sum(axis=0) / (len(counts) - 1)
    return np.asarray(1 + np.where(np.isfinite(spread), spread, 0))
