"""Rules on running variances that are next to nothing.

Constant inputs, and units that a ReLU switched off, leave such variances in healthy networks, and do no harm: what is
constant in training is constant afterwards. So they are worth knowing, no more, unless something says otherwise. Behind
the first layer only a unit that has been dead for hundreds of batches has a subnormal one: that is worth a look.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn.health.finding import Severity
from cubn.health.layer import Layer
from cubn.health.rules.measures import RECALIBRATE, alive_in_data, constant_in_data, dead_channels, eps_of, gains
from cubn.health.rules.registry import Channels, Found, Network, rule

MANY = 0.5
"""Share of a layer's channels: more dead ones are not what training leaves in a healthy one."""

LOW = 100.0
"""How far below the layer's median a variance is that is about to be nothing."""

VISIBLE = 0.01
"""Noise in an output, where 1 is what batch norm aims at."""

ROUNDING = 2.0**-24
"""Of a float32 number, relative to it."""

CAUSE = "inputs that are constant, dead units before it, or weights that decayed to 0"


@rule("subnormal-variance")
def subnormal_variance(layer: Layer, network: Network) -> Iterator[Found]:
    """A running variance is below the smallest normal float32 number: batch after batch had no variance at all.

    It is an error where the layer's Moments have some, and a warning elsewhere; info where the Moments have none
    either, or in the first of several layers, whose inputs may have constant channels.
    """
    if layer.running_var is None:
        return
    wrong = _subnormal(layer)
    explained = wrong & (constant_in_data(layer) | network.may_see_inputs(layer))
    what = "running_var is subnormal"
    yield from _constant(layer, what, explained, "info")
    yield from _constant(layer, what, wrong & ~explained, "warning")


@rule("dead")
def dead(layer: Layer, network: Network) -> Iterator[Found]:
    """A running variance is far below eps: the channel was constant.

    It is an error where the layer's Moments say that it is not, and a warning where it is most of a layer, or where the
    mere rounding of its mean is amplified to something visible. Otherwise it does no harm.
    """
    if layer.running_var is None:
        return
    yield from _constant(
        layer,
        "the channel was constant: running_var is nothing beside eps",
        dead_channels(layer) & ~_subnormal(layer),
        "info",
    )
    if layer.running_mean is None:
        return
    noise = np.abs(layer.running_mean) * ROUNDING * gains(layer)
    if (noisy := dead_channels(layer) & (noise > VISIBLE)).any():
        evidence = {"running_mean": layer.running_mean, "gain": gains(layer), "noise of the output": noise}
        yield Found(
            "warning",
            "the channel was constant, and the rounding of its value is amplified",
            noisy,
            {name: values[noisy] for name, values in evidence.items()},
            "an eps that is small beside the square of what float32 cannot tell apart at this mean",
            "bn.eps = 1e-5",
        )


@rule("collapsing")
def collapsing(layer: Layer, network: Network) -> Iterator[Found]:
    """A running variance fell below eps, far from the layer's others: the channel is about to die."""
    var, eps = layer.running_var, eps_of(layer)
    if var is None:
        return
    living = np.isfinite(var) & (var > 0) & ~dead_channels(layer)
    if not living.any():
        return
    median = float(np.median(var[living]))
    wrong = living & (var < eps) & (var * LOW < median)
    if wrong.any():
        yield Found(
            _by_share(wrong),
            "running_var is below eps, and far below the layer's others",
            wrong,
            {"running_var": var[wrong], "median of the layer": median, "eps": eps},
            "inputs that are seldom not constant, or a channel that is dying",
            "watch it: cubn.health.Monitor(model)",
        )


def _constant(layer: Layer, what: str, wrong: Channels, severity: Severity) -> Iterator[Found]:
    """Channels that were constant for the running statistics; apart, those that are not in the data."""
    assert layer.running_var is not None
    alive = wrong & alive_in_data(layer)
    if alive.any() and layer.moments is not None:
        yield Found(
            "error",
            f"{what}, but the data varies: it is amplified by 1/√eps",
            alive,
            {
                "running_var": layer.running_var[alive],
                "var of the data": layer.moments.var()[alive],
                "eps": eps_of(layer),
            },
            "a channel that died and came to life, or statistics that were lost",
            RECALIBRATE,
        )
    if (still := wrong & ~alive).any():
        harmless = severity == "info"
        yield Found(
            _by_share(wrong) if harmless else severity,
            f"{what}; harmless while its inputs stay constant" if harmless else what,
            still,
            {"running_var": layer.running_var[still], "eps": eps_of(layer)},
            CAUSE,
            f"see whether the data varies: cubn.diagnose(model, moments); if so, {RECALIBRATE}",
        )


def _subnormal(layer: Layer) -> Channels:
    assert layer.running_var is not None
    return (layer.running_var > 0) & (layer.running_var < np.finfo(np.float32).tiny)


def _by_share(wrong: Channels) -> Severity:
    """A warning where most channels of a layer are concerned; of a layer of one channel there are no others."""
    return "warning" if wrong.size > 1 and wrong.mean() > MANY else "info"
