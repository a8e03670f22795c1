"""The batches that running statistics saw follow from the running statistics, to what rounding leaves."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cubn
from cubn import health

Monitor = partial(health.Monitor, every=1)

U = 2.0**-24
"""Of float32: the most by which rounding changes a number, relative to it."""


def trained(updates, every=1, steps=6, seed=0, **options):
    """A monitor, a state, and mean and unbiased variance of each batch that it saw."""
    rng = np.random.default_rng(seed)
    state = cubn.BatchNormState(3, **options)
    monitor = health.Monitor(state, every=every)
    seen = []
    for _ in range(steps):
        for _ in range(updates):
            x = rng.normal(rng.normal(0, 2, (1, 3, 1)), 1 + rng.random((1, 3, 1)), (5, 3, 4)).astype(np.float32)
            cubn.forward_train(x, state)
            taken = cubn.moments(x)
            seen.append((taken.mean, taken.var_unbiased()))
        monitor.step()
    return monitor.history["state"], np.array(seen)


@given(st.floats(0.01, 1.0), st.integers(0, 1000))
def test_a_batch_follows_from_two_readings_within_the_error_that_is_stated(momentum, seed):
    history, seen = trained(1, momentum=momentum, seed=seed)
    for name, i in (("batch_mean", 0), ("batch_var", 1)):
        found, running = getattr(history, name), (history.running_mean, history.running_var)[i]
        bound = U * np.abs(running).max(axis=0) / momentum + U * np.abs(seen[:, i]).max(axis=0)
        assert np.isnan(found[0]).all()
        assert (np.abs(found[1:] - seen[1:, i]) <= 1.01 * bound).all()


@pytest.mark.parametrize("updates", [2, 5])
@pytest.mark.parametrize("momentum", [0.1, 0.6])
def test_several_updates_give_the_average_with_their_weights(updates, momentum):
    history, seen = trained(updates, momentum=momentum)
    weights = momentum * (1 - momentum) ** np.arange(updates)[::-1]
    averages = np.average(seen.reshape(-1, updates, 2, 3), axis=1, weights=weights)
    np.testing.assert_allclose(history.batch_mean[1:], averages[1:, 0], atol=10 * U / momentum)
    np.testing.assert_allclose(history.batch_var[1:], averages[1:, 1], rtol=20 * U / momentum)


def test_records_of_several_steps_give_the_same_as_readings_of_several_updates():
    apart, _ = trained(1, every=3, steps=10, momentum=0.2)
    assert apart.steps.tolist() == [0, 3, 6, 9]
    assert (np.diff(apart.tracked, axis=0) == 3).all() and np.isfinite(apart.batch_mean[1:]).all()


def test_the_batches_of_a_cumulative_average_follow_too():
    history, seen = trained(2, momentum=None, steps=8)
    averages = seen.reshape(-1, 2, 2, 3).mean(axis=1)
    np.testing.assert_allclose(history.batch_mean[1:], averages[1:, 0], atol=20 * 16 * U)
    assert history.momentum is None and np.isfinite(history.eval_rms[1:]).all()


def test_where_nothing_was_updated_nothing_is_known():
    state = cubn.BatchNormState(2)
    monitor = Monitor(state, on_finding=lambda found: None)
    x = np.random.default_rng(0).standard_normal((4, 2, 5), dtype=np.float32)
    cubn.forward_train(x, state)
    monitor.step()
    monitor.step()
    x[0, 1, 0] = np.inf
    cubn.forward_train(x, state)
    monitor.step()
    found = monitor.history["state"].batch_mean
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[2, 0]) and np.isnan(found[2, 1])


def test_statistics_that_were_reset_are_no_batch():
    state = cubn.BatchNormState(2)
    monitor = Monitor(state)
    for _ in range(3):
        cubn.forward_train(np.random.default_rng(0).standard_normal((4, 2, 5), dtype=np.float32), state)
    monitor.step()
    state.reset()
    monitor.step()
    assert np.isnan(monitor.history["state"].batch_var[1]).all()


def test_batches_that_keep_still_are_as_large_in_evaluation_and_those_that_move_are_not():
    rng = np.random.default_rng(0)
    state = cubn.BatchNormState(2, momentum=0.01)
    monitor = Monitor(state, on_finding=lambda found: None)
    for step in range(40):  # young: the initial 0 and 1 would still weigh 67 %
        x = rng.normal(0, 7, (64, 2, 9)).astype(np.float32)
        x[:, 1] *= 1.2**step
        cubn.forward_train(x, state)
        monitor.step()
    still, moving = monitor.history["state"].eval_rms[-1]
    assert 0.9 < still < 1.1 and moving > 2.5
