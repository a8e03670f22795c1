"""Moments between a batch's and running statistics: what test-time adaptation normalises by."""

import numpy as np
import pytest

import cubn
from tests.ops import arrays
from tests.ops.arrays import assert_same

X = np.random.default_rng(0).normal(2, 3, (8, 3, 4)).astype(np.float32)


def trained(like=None, **options):
    state = cubn.BatchNormState(3, like=like, **options)
    cubn.update(state, cubn.moments(np.random.default_rng(1).normal(0, 2, (50, 3))))
    return state


@pytest.mark.parametrize("library", arrays.LIBRARIES)
@pytest.mark.parametrize("weight", [0.25, 1 / 3, np.float32(0.5)])
def test_a_blend_is_the_formula_in_float64(library, weight):
    pytest.importorskip(library)
    state, own = trained(like=arrays.carry(X, library)), cubn.moments(X)
    found, w = own.blend(state, weight), float(weight)
    mean, var = (np.asarray(a).astype(np.float64) for a in (state.running_mean, state.running_var))
    assert_same(found.mean, (1 - w) * mean + w * own.mean)
    assert_same(found.m2, ((1 - w) * var + w * own.var()) * own.count)
    assert found.count == own.count and not found.exact


def test_moments_are_blended_by_their_biased_variance():
    own, other = cubn.moments(X), cubn.moments(X[:3] * 2, start=5)
    found = own.blend(other, 0.75)
    assert_same(found.mean, 0.25 * other.mean + 0.75 * own.mean)
    np.testing.assert_allclose(found.var(), 0.25 * other.var() + 0.75 * own.var(), rtol=1e-15)


@pytest.mark.parametrize("weight", [0, 1])
def test_what_has_no_weight_is_not_looked_at(weight):
    bad = np.full(3, np.nan)
    state = cubn.BatchNormState.from_arrays(running_mean=bad, running_var=bad.copy(), check=False)
    own, wild = cubn.moments(X), cubn.moments(np.full((2, 3), np.inf))
    found = own.blend(state, 1) if weight else wild.blend(own, 0)
    assert_same(found.mean, own.mean)
    np.testing.assert_allclose(found.var(), own.var(), rtol=1e-15)


def test_at_the_ends_a_blend_normalises_like_inference_and_like_training():
    state, own = trained(dtype="float64"), cubn.moments(X)
    options = {"gamma": state.gamma, "beta": state.beta, "eps": state.eps}
    np.testing.assert_allclose(cubn.normalize(X, own.blend(state, 0), **options), cubn.forward(X, state), rtol=1e-6)
    y, _ = cubn.forward_train(X, state.copy())
    np.testing.assert_allclose(cubn.normalize(X, own.blend(state, 1), **options), y, rtol=1e-6)


def test_a_blend_leaves_nothing_to_reset():
    """Neither in the state, nor in what a later batch gets."""
    state, own = trained(), cubn.moments(X)
    before = state.to_dict()
    first = own.blend(state, 0.5)
    cubn.moments(X * 100).blend(state, 0.9)
    np.testing.assert_equal(state.to_dict(), before)
    assert_same(own.blend(state, 0.5).mean, first.mean)
