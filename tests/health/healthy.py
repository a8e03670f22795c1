"""Layers as training leaves them, for tests to spoil."""

from dataclasses import replace

import numpy as np

import cubn
from cubn.health.diagnose import examine
from cubn.health.layer import Layer


def healthy(C=16, seed=0, **changes):
    """A trained layer, its running statistics those of normal inputs; with arrays changed at given channels.

    `running_var={3: 0.0}` puts numbers into single channels; anything else replaces a field.
    """
    rng = np.random.default_rng([seed, C])
    layer = Layer(
        "block.bn",
        C,
        gamma=rng.uniform(0.5, 1.5, C),
        beta=rng.normal(0, 0.3, C),
        running_mean=rng.normal(0, 1, C),
        running_var=np.exp(rng.normal(0, 0.7, C)),
        dtypes=dict.fromkeys(("gamma", "beta", "running_mean", "running_var"), "float32"),
        eps=1e-5,
        momentum=0.1,
        running_variance="unbiased",
        tracked=np.full(C, 500, np.int64),
        skipped=np.zeros(C, np.int64),
    )
    return replace(layer, **{name: spoiled(getattr(layer, name), change) for name, change in changes.items()})


def spoiled(values, change):
    if not isinstance(change, dict):
        return change
    values = values.copy()
    for channel, value in change.items():
        values[channel] = value
    return values


def with_data(layer, N=2000, shift=0.0, scale=1.0):
    """The layer with Moments of normal inputs of its own mean and variance, moved and scaled."""
    x = np.random.default_rng(7).standard_normal((N, layer.num_features))
    x = layer.running_mean + shift + x * np.sqrt(layer.running_var) * scale
    return replace(layer, moments=cubn.moments(x))


def findings_of(*layers):
    """(rule, severity, channels) of what is found."""
    return [(found.rule, found.severity, found.channels) for found in examine(layers).findings]
