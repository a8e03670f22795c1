"""Rules on how running statistics change: what a single look at them cannot tell.

To add one, write a function here that looks closely at one layer, and one that says which channels are suspect, out of
the newest values of all layers together; it is asked every few steps, and the first only of layers that have some:

    @trend("my-rule", lambda history: history.newest("running_var") > 1e6)
    def my_rule(layer: LayerHistory) -> Iterator[Found]:
        \"\"\"What it says, in one sentence.\"\"\"
        yield Found("warning", "running_var is large", layer.running_var[-1] > 1e6)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn.health.finding import Finding, Severity
from cubn.health.records import RECENT, History, LayerHistory
from cubn.health.rules.registry import Found, finding_of

Floats = NDArray[np.floating[Any]]
Channels = NDArray[np.bool_]

WINDOW = 6
"""Records over which what batches do by chance is evened out."""

BEHIND, FAR_BEHIND = 1.6, 3.0
"""Times the size that training gives them. Of 290 healthy runs on the digits (momenta 0.01 to 0.5 and cumulative
averages, batches of 8 to 256, rates up to where losses still fall) ten came to more than 1.4, and one to 1.6: by its
running statistics the loss was ten times that by the batches'. Runs whose validation exploded are at 1.7 to 3.7."""

SUDDEN = 3
"""Records in which `FAR_BEHIND` is seen, too: after a jump a large momentum has caught up before a window is over. Of
healthy runs no layer came to more than 1.5 in so few."""

SUSPECT = 1.3
"""The same of the newest record alone, to have a closer look."""

CHANNEL_BEHIND = 6.0
"""The same of a single channel: healthy ones stay under 2.6."""

FEW_UPDATES = 10
"""Fewer have not shown what batches are like."""

SINKING = 0.5
"""What is left of a variance over the window in which it never rose."""

NEARLY_DEAD = 10.0
"""Times eps: a variance below this is on its way to where eps divides the channel."""

ROUNDING = 1e-5
"""Of a variance: less of it than this may be what rounding left."""

GROWN = 10.0
"""Times the median gain of the layer, and times what it was when the running statistics had forgotten 0 and 1."""

BY_GAMMA = 2.0
"""Times what gamma was: with less, it is the variance that makes the gain grow."""

STILL_GROWING = 1.1
"""Times, over the window."""

FORGOTTEN = 0.05
"""What the initial 0 and 1 may still weigh in running statistics that are compared with later ones."""

SKIPPED_OFTEN = 0.5
"""Of the updates since the oldest of the recent records."""

SKIPPED_MORE_THAN = 0.01
"""Of the same: a loss scale that is tried out overflows in a step of hundreds."""

Suspects = Callable[[History], Channels]
"""Of all layers' channels, one after the other, whether a rule should look at their layer."""

Examine = Callable[[LayerHistory], Iterable[Found]]


class Trend(NamedTuple):
    """A rule over histories."""

    suspects: Suspects
    findings: Callable[[LayerHistory], list[Finding]]


TRENDS: dict[str, Trend] = {}
"""All of them, by their ids."""


def trend(name: str, suspects: Suspects) -> Callable[[Examine], Examine]:
    """Make a function a rule: it looks at one layer's history, and yields what it found."""

    def register(examine: Examine) -> Examine:
        TRENDS[name] = Trend(suspects, lambda layer: [finding_of(name, layer.name, found) for found in examine(layer)])
        return examine

    return register


def trends(history: History) -> list[Finding]:
    """What all rules find in all layers."""
    if not history.records:
        return []
    with np.errstate(all="ignore"):
        return [
            found
            for rule in TRENDS.values()
            for name in history.holding(rule.suspects(history))
            for found in rule.findings(history[name])
        ]


def _not_finite(history: History) -> Channels:
    gamma, mean, var = (np.isfinite(history.newest(name)) for name in ("gamma", "running_mean", "running_var"))
    wrong: Channels = np.logical_not(gamma & mean & var)
    return wrong


def _skipped(history: History) -> Channels:
    grown: Channels = history.newest("skipped") > history.oldest("skipped")
    return grown


def _behind(history: History) -> Channels:
    rms = history.newest("eval_rms")
    behind: Channels = (rms >= CHANNEL_BEHIND) | history.spread(history.mean(rms * rms) >= SUSPECT**2)
    return behind


def _low(history: History) -> Channels:
    var = history.newest("running_var")
    low: Channels = (var > 0) & (var < NEARLY_DEAD * history.eps)
    return low


def _large_gain(history: History) -> Channels:
    """Measured by the geometric mean of the layer, which takes no sorting."""
    gain = np.abs(history.newest("gamma")) / np.sqrt(history.newest("running_var") + history.eps)
    large: Channels = gain > GROWN / 2 * history.spread(np.exp(history.mean(np.log(gain))))
    return large


@trend("became-non-finite", _not_finite)
def became_non_finite(layer: LayerHistory) -> Iterator[Found]:
    """A running statistic or a gamma has become NaN or infinite."""
    for name in ("running_mean", "running_var", "gamma"):
        if np.isfinite(getattr(layer.last(1), name)).all():
            continue
        recent = layer.last(2 * RECENT)
        values = getattr(recent, name)
        wrong = ~np.isfinite(values)
        first = int(recent.steps[wrong.any(axis=1).argmax()])
        yield Found(
            "error",
            f"{name} is not finite since step {first}",
            wrong[-1],
            {"step": first, "value": values[-1][wrong[-1]]},
            "a batch held an inf or a NaN, or the parameters before this layer did",
            "cubn.torch.convert(model) leaves such batches out; cubn.recalibrate(model, batches) repairs",
        )


@trend("updates-skipped", _skipped)
def updates_skipped(layer: LayerHistory) -> Iterator[Found]:
    """Batches were left out of the running statistics, since they were not finite."""
    recent = layer.last(RECENT)
    missed = recent.skipped[-1] - recent.skipped[0]
    some = missed > 0
    if some.any():
        made = recent.tracked[-1] - recent.tracked[0]
        worst = float((missed / np.maximum(made, 1)).max())
        often = worst >= SKIPPED_OFTEN and made.max() >= FEW_UPDATES
        severity: Severity = "error" if often else "warning" if worst > SKIPPED_MORE_THAN else "info"
        yield Found(
            severity,
            f"{int(missed.max())} of the last {int(made.max())} batches were not finite and changed nothing",
            some,
            {"skipped": missed[some], "updates": int(made.max()), "since": int(recent.steps[0])},
            "a loss scale or a learning rate that is too high, or bad data",
            "look at the first layer with this finding; lower the learning rate or the loss scale",
        )


@trend("running-behind", _behind)
def running_behind(layer: LayerHistory) -> Iterator[Found]:
    """Batches move faster than the running statistics follow: what evaluation makes of them is too large.

    Of each channel, the median of `eval_rms` over the window; of the layer, the root mean square of that over channels.
    It is 1 where batches keep still, and layers behind each other multiply theirs. What is far behind is told sooner.
    """
    recent = layer.last(WINDOW)
    if len(recent) < WINDOW or recent.tracked[-1].max() < FEW_UPDATES:
        return
    size = _median(recent.eval_rms)
    whole = _root_mean_square(size)
    far = whole >= FAR_BEHIND
    sudden = _median(recent.last(SUDDEN).eval_rms)
    if whole < BEHIND and _root_mean_square(sudden) >= FAR_BEHIND:
        size, whole = sudden, _root_mean_square(sudden)
    worst = size >= CHANNEL_BEHIND
    if whole < BEHIND and not worst.any():
        return
    wrong = size >= (BEHIND if whole >= BEHIND else CHANNEL_BEHIND)
    yield Found(
        "error" if far else "warning",
        f"running statistics are behind the batches: in evaluation the layer's outputs would be {whole:.1f} times as "
        "large"
        if whole >= BEHIND
        else f"running statistics are behind the batches in {int(worst.sum())} of {len(size)} channels",
        wrong,
        {"size": whole, "size of channel": size[wrong], "since": int(recent.steps[0]), "step": int(recent.steps[-1])},
        "a learning rate at which the layers before this one change within the memory of the running statistics",
        "cubn.recalibrate(model, batches) before each evaluation; or a lower learning rate, or a larger momentum",
    )


@trend("variance-sinking", _low)
def variance_sinking(layer: LayerHistory) -> Iterator[Found]:
    """A running variance halves again and again, and nothing in the batches holds it up: the channel dies.

    What the initial 1 still weighs is taken out first: it always sinks. Worth knowing, no more, in the first of several
    layers, whose inputs may be constant for as long in a healthy training.
    """
    newest = layer.last(1).running_var[0]
    low = (newest > 0) & (newest < NEARLY_DEAD * layer.eps)
    recent = layer.last(RECENT)
    if len(recent) < WINDOW or not low.any():
        return
    var = recent.running_var - _initial_weights(recent)
    falls = (var[1:] <= var[:-1]).all(axis=0) & (var[-1] <= SINKING * var[0]) & (var[-1] > ROUNDING * newest)
    unsupported = ~(recent.batch_var[1:] > recent.running_var[1:]).any(axis=0)
    if (wrong := low & falls & unsupported).any():
        steps = recent.steps[-1] - recent.steps[0]
        halved = steps / np.log2(var[0][wrong].astype(float) / var[-1][wrong])
        yield Found(
            "info" if layer.may_see_inputs else "warning",
            f"running_var halves every {halved.min():.0f} steps",
            wrong,
            {"running_var": newest[wrong], "steps to halve": halved, "eps": layer.eps},
            "the channel's inputs are constant: weights that became 0, or units that a ReLU switched off",
            "lower the learning rate or the weight decay of the layer before; a larger eps bounds the gain",
        )


@trend("gain-growing", _large_gain)
def gain_growing(layer: LayerHistory) -> Iterator[Found]:
    """A channel's gain, |gamma| / sqrt(running_var + eps), grows out of proportion to its layer and to what it was.

    What it was is taken without what the initial 1 still weighed in the variance. Worth knowing, no more, where
    the variance does it in the first of several layers: inputs that are seldom not constant do.
    """
    gain = _gain(layer.last(1))[0]
    wrong = np.isfinite(gain) & (gain >= GROWN * np.median(gain))
    if len(layer) < WINDOW or not wrong.any():
        return
    initial = _initial_weights(layer)
    settled = (initial < FORGOTTEN).all(axis=1)
    first = settled.argmax()
    gamma, var = layer.gamma[first], (layer.running_var[first] - initial[first]) / (1 - initial[first])
    begin = _gain_of(gamma, var, layer.eps)
    wrong &= settled.any() & (gain >= GROWN * begin) & (gain >= STILL_GROWING * _gain(layer.last(RECENT))[0])
    by_variance = wrong & (np.abs(layer.last(1).gamma[0]) < BY_GAMMA * np.abs(gamma))
    harmless = by_variance if layer.may_see_inputs else np.zeros_like(wrong)
    by_severity: list[tuple[Severity, Channels]] = [("warning", wrong & ~harmless), ("info", harmless)]
    for severity, found in by_severity:
        if not found.any():
            continue
        times = gain[found] / begin[found]
        yield Found(
            severity,
            f"the gain has grown {times.max():.0f}-fold, and grows on",
            found,
            {"gain": gain[found], "times": times},
            "a running variance that sinks while gamma does not, or a gamma that diverges",
            "weight decay on gamma, a larger eps, or a lower learning rate",
        )


def _initial_weights(layer: LayerHistory) -> Floats:
    """What the initial 0 and 1 still weighed in each record and channel; nothing in a cumulative average."""
    updates = layer.tracked - layer.skipped
    return np.zeros(updates.shape) if layer.momentum is None else (1 - layer.momentum) ** updates


def _median(values: Floats) -> Floats:
    """Over records, of what is known; the upper one of two."""
    ordered = np.sort(values, axis=0)  # NaN last
    middle = (values == values).sum(axis=0) // 2
    median: Floats = np.take_along_axis(ordered, middle[None], axis=0)[0]
    return median


def _root_mean_square(values: Floats) -> float:
    """Of what is known; 0 where nothing is."""
    known = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(known**2))) if known.size else 0.0


def _gain(layer: LayerHistory) -> Floats:
    return _gain_of(layer.gamma, layer.running_var, layer.eps)


def _gain_of(gamma: Floats, var: Floats, eps: float) -> Floats:
    gain: Floats = np.abs(gamma) / np.sqrt(np.maximum(var, 0) + eps)
    return gain
