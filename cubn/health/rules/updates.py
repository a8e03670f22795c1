"""Rules on how running statistics were updated: never, too seldom, and how often by the counters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn.health.finding import Severity
from cubn.health.layer import Layer
from cubn.health.rules.measures import RECALIBRATE
from cubn.health.rules.registry import Channels, Found, Network, rule, statistics, untouched

SKIPPED_SOME, SKIPPED_MANY = 0.05, 0.5
"""Of a channel's updates. A loss scale that is being found overflows in a few steps of thousands."""

LATELY = 2.0
"""By how much the latest updates must be skipped more often than all of them, to say that it grows."""


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
    by_severity: list[tuple[Severity, Channels]] = [("error", many), ("warning", some), ("info", few)]
    for severity, wrong in by_severity:
        if wrong.any():
            evidence = {"share": share[wrong], "skipped": layer.skipped[wrong], "tracked": layer.tracked[wrong]}
            if lately is not None:
                evidence["share lately"] = lately[wrong]
            what = "many updates" if severity == "error" else "updates"
            more = ", lately more of them" if (grows & wrong).any() else ""
            yield Found(severity, f"{what} left running statistics as they were{more}", wrong, evidence, cause, remedy)


@rule("counts")
def counts(layer: Layer, network: Network) -> Iterator[Found]:
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
    elif moved and 0 < layer.tracked[0] < network.most_updates / 2:
        yield Found(
            "info",
            "the layer counts less than half the updates of another",
            evidence={"tracked": int(layer.tracked[0]), "most of the others": network.most_updates},
            cause="a layer that was frozen, added later, or is not used in every step",
        )
