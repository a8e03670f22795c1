"""Running statistics beside Moments: found where they are far, in units of what sampling does."""

from dataclasses import replace

import numpy as np
import pytest

import cubn
from cubn.health.diagnose import examine
from tests.health.healthy import findings_of, healthy, with_data


@pytest.mark.parametrize("C", [1, 16, 257])
@pytest.mark.parametrize(
    ("shift", "scale", "severity"),
    [(2.0, 1.0, "warning"), (20.0, 1.0, "error"), (0.0, 3.0, "warning"), (0.0, 30.0, "error"), (0.0, 1 / 30, "error")],
)
def test_channels_of_other_data_are_found(shift, scale, severity, C):
    channel = C // 2
    layer = healthy(C)
    sigma = np.sqrt(layer.running_var)
    others = np.arange(C) != channel
    moved = with_data(layer, shift=np.where(others, 0, shift * sigma), scale=np.where(others, 1, scale))
    found = findings_of(moved)
    if C == 1:  # which is most of its layer
        severity = "error"
    assert found == [("stale", severity, (channel,))]


def test_a_layer_that_is_mostly_of_other_data_is_an_error():
    layer = healthy()
    moved = with_data(layer, scale=np.where(np.arange(16) < 9, 3.0, 1.0))
    assert findings_of(moved) == [("stale", "error", tuple(range(9)))]


def test_evidence_is_in_standard_errors_and_sigmas():
    layer = healthy()
    sigma = np.sqrt(layer.running_var)
    (found,) = examine([with_data(layer, shift=np.where(np.arange(16) == 3, 5 * sigma, 0))]).findings
    assert found.evidence["shift in σ"] == pytest.approx([5], rel=0.05)
    n = 1 / (1 / (8 * 19) + 1 / 2000)  # 19 batches, of 8 values at the least
    assert found.evidence["standard errors"] == pytest.approx([5 * n**0.5], rel=0.05)


def sampled(momentum, batches, batch, seed, values):
    """A layer whose statistics were really taken, batch by batch, and Moments of other values."""
    rng = np.random.default_rng(seed)
    state = cubn.BatchNormState(64, momentum=momentum)
    for _ in range(batches):
        cubn.update(state, cubn.moments(values(rng, (batch, 64))))
    (layer,) = cubn.diagnose(state).layers
    return replace(layer, moments=cubn.moments(values(rng, (1500, 64))))


HEAVY = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "behind a ReLU": lambda rng, shape: np.maximum(rng.standard_normal(shape) - 1, 0),
    "of Student's t": lambda rng, shape: rng.standard_t(5, shape),
    "far from 0": lambda rng, shape: rng.standard_normal(shape) + 1000,
}


@pytest.mark.parametrize("values", HEAVY)
@pytest.mark.parametrize(
    ("momentum", "batches", "batch"), [(0.1, 100, 8), (0.1, 100, 256), (0.01, 1000, 8), (0.5, 30, 8), (None, 20, 8)]
)
def test_sampling_alone_is_nothing(momentum, batches, batch, values):
    assert findings_of(sampled(momentum, batches, batch, 0, HEAVY[values])) == []


def test_statistics_that_hold_what_they_began_with_say_so():
    few = sampled(0.01, 30, 64, 0, lambda rng, shape: 5 + rng.standard_normal(shape) / 10)
    (mean, var) = examine([few]).findings
    assert mean.rule == var.rule == "stale" and mean.severity == var.severity == "warning"
    assert "30 updates" in mean.cause and len(mean.channels) == 64


def test_a_few_channels_of_small_variance_that_hold_what_they_began_with_are_worth_knowing():
    scale = np.where(np.arange(64) < 5, 1e-3, 1.0)
    layer = sampled(0.02, 200, 64, 0, lambda rng, shape: rng.standard_normal(shape) * scale)
    assert findings_of(layer) == [("stale", "info", (0, 1, 2, 3, 4))]


def test_tails_that_the_moments_show_excuse_a_variance():
    x = np.random.default_rng(0).standard_normal((1500, 4))
    x[700, 2] = 80.0
    layer = replace(healthy(4, running_mean=np.zeros(4), running_var=np.ones(4) * 1.01), moments=cubn.moments(x))
    assert findings_of(layer) == []
    spread = np.random.default_rng(0).standard_normal((1500, 4)) * [1, 1, 2.3, 1]
    assert findings_of(replace(layer, moments=cubn.moments(spread))) == [("stale", "warning", (2,))]


@pytest.mark.parametrize("count", [0, 1])
def test_moments_of_next_to_nothing_say_nothing(count):
    layer = replace(healthy(running_mean={2: 1e6}), moments=cubn.moments(np.zeros((count, 16))))
    assert findings_of(layer) == []


def test_the_variance_of_a_single_batch_says_little():
    layer = with_data(healthy())
    layer = replace(layer, running_var=np.where(np.arange(16) == 2, layer.running_var / 1000, layer.running_var))
    assert ("stale", "error", (2,)) in findings_of(layer)
    assert "stale" not in {rule for rule, _, _ in findings_of(replace(layer, momentum=1.0))}
