"""Rules on eps and momentum."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn.health.layer import Layer
from cubn.health.rules.measures import dead_channels
from cubn.health.rules.registry import Found, Network, rule, weight

EPS_LOW, EPS_HIGH = 1e-12, 0.1
"""Frameworks have 1e-5 and 1e-3. Below the one, a channel that is constant amplifies its rounding a million times."""

KERAS_MOMENTUM = 0.9
"""From here on: weights of the old value, as Keras, Flax and Caffe have them, are 0.9, 0.99, 0.997, 0.999."""

MOMENTUM_LOW = 1e-4
"""Below this, statistics need tens of thousands of steps, and float32 loses updates of less than 0.1 %."""


@rule("eps")
def unusual_eps(layer: Layer, network: Network) -> Iterator[Found]:
    """eps is no positive number, out of the usual, or larger than most variances of the layer."""
    eps, var = layer.eps, layer.running_var
    if eps is None:
        return
    if not (np.isfinite(eps) and eps >= 0) or (eps == 0 and (var is None or (var == 0).any())):
        channels = None if var is None or eps != 0 else var == 0
        what = f"eps is {eps:g}" + (", and running_var is 0: outputs are NaN or infinite" if eps == 0 else "")
        yield Found("error", what, channels, {"eps": eps}, "a wrong number in a configuration", "bn.eps = 1e-5")
    elif not EPS_LOW <= eps <= EPS_HIGH:
        cause = "a configuration that means another eps, or inputs in other units"
        yield Found("warning", f"eps={eps:g} is out of the usual", None, {"eps": eps}, cause, "bn.eps = 1e-5")
    elif var is not None:
        living = var[np.isfinite(var) & (var > 0) & ~dead_channels(layer)]
        if living.size and (median := float(np.median(living))) < eps:
            yield Found(
                "warning",
                "eps is larger than most variances of the layer: outputs are less than 0.7 times what they should be",
                None,
                {"eps": eps, "median of running_var": median},
                "inputs in small units, or weights that decayed: batch norm hides their size, eps does not",
                "scale the inputs, or bn.eps = 1e-5 or less and train on",
            )


@rule("momentum")
def unusual_momentum(layer: Layer, network: Network) -> Iterator[Found]:
    """momentum is no weight, moves nothing, or looks like the weight of the old value."""
    momentum = weight(layer)
    if momentum is None or layer.running_mean is None:
        return
    evidence = {"momentum": momentum}
    if not 0 <= momentum <= 1:
        what = f"momentum={momentum:g} is no weight: running statistics diverge"
        yield Found("error", what, None, evidence, "a wrong number in a configuration", "bn.momentum = 0.1")
    elif momentum == 0:
        what = "momentum is 0: running statistics never move"
        cause = "a layer that was frozen this way, or 1 − momentum of a framework that rounds"
        yield Found("warning", what, None, evidence, cause, "bn.momentum = 0.1")
    elif momentum >= KERAS_MOMENTUM:
        yield Found(
            "warning",
            f"momentum={momentum:g} is the weight of the new value: running statistics are those of the last batches",
            None,
            evidence,
            "Keras', Flax' and Caffe's momentum, the weight of the old value, taken over without 1 − momentum",
            f"bn.momentum = {1 - momentum:.4g}" if momentum < 1 else "bn.momentum = 0.1",
        )
    elif momentum < MOMENTUM_LOW:
        what = f"momentum={momentum:g}: running statistics need {3 / momentum:.0f} steps, and float32 loses small ones"
        yield Found("info", what, None, evidence, "a wrong number in a configuration", "bn.momentum = None, to pool")
