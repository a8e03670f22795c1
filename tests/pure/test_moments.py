"""Moments as values: of nothing, merged from either side, pickled."""

import itertools
import pickle

import numpy as np
import pytest

import cubn
from tests.ops.arrays import assert_same

X = np.random.default_rng(0).standard_normal((11, 3, 5)).astype(np.float32)


def assert_same_moments(a, b):
    assert (a.start, a.stop, a.num_features, a.count) == (b.start, b.stop, b.num_features, b.count)
    assert_same(a.mean, b.mean, "mean")
    assert_same(a.m2, b.m2, "m2")


def test_against_the_textbook():
    m, x = cubn.moments(X), X.astype(np.float64)
    assert m.count == 55 and m.count.dtype == np.int64
    np.testing.assert_allclose(m.mean, x.mean((0, 2)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(m.var(), x.var((0, 2)), rtol=2e-7)
    np.testing.assert_allclose(m.var_unbiased(), x.var((0, 2), ddof=1), rtol=2e-7)
    assert {a.dtype for a in (m.mean, m.m2, m.var(), m.var_unbiased())} == {np.dtype(np.float64)}


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (0, 3)])
def test_of_nothing(shape):
    m = cubn.moments(np.zeros(shape, np.float32), start=6)
    assert (m.start, m.stop, m.count) == (6, 6 + shape[0], 0)
    assert_same(m.mean, np.zeros(3))
    assert_same(m.m2, np.zeros(3))
    assert np.isnan(m.var()).all() and np.isnan(m.var_unbiased()).all()


def test_of_one_value():
    m = cubn.moments(X[:1, :, 0])
    assert_same(m.var(), np.zeros(3))
    assert np.isnan(m.var_unbiased()).all()


@pytest.mark.parametrize("cuts", [(0, 11), (0, 4, 11), (0, 3, 5, 6, 11), (0, 0, 7, 7, 11, 11), range(12)])
@pytest.mark.parametrize("offset", [0, 1, 6])
def test_cuts_from_either_side(cuts, offset):
    cuts = list(cuts)
    whole = cubn.moments(X, start=offset)
    parts = [cubn.moments(X[a:b], start=offset + a) for a, b in itertools.pairwise(cuts)]
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = forwards.merge(part)
    for part in parts[-2::-1]:
        backwards = backwards.merge(part)
    assert_same_moments(forwards, whole)
    assert_same_moments(backwards, whole)
    assert forwards._nodes.blocks == backwards._nodes.blocks == whole._nodes.blocks


def test_merging_changes_neither():
    a, b = cubn.moments(X[:4]), cubn.moments(X[4:], start=4)
    copies = pickle.loads(pickle.dumps((a, b)))
    a.merge(b)
    assert_same_moments(a, copies[0])
    assert_same_moments(b, copies[1])


def test_samples_without_positions_between():
    parts = [cubn.moments(X[:3]), cubn.moments(X[:2, :, :0], start=3), cubn.moments(X[3:], start=5)]
    absent = parts[0].merge(parts[1]).merge(parts[2])
    mask = np.ones((13, 1), bool)
    mask[3:5] = False
    assert_same_moments(absent, cubn.moments(np.insert(X, [3, 3], 0, axis=0), mask=mask))


def test_a_pickle_merges_on():
    a, b = (pickle.loads(pickle.dumps(m)) for m in (cubn.moments(X[:5]), cubn.moments(X[5:], start=5)))
    assert_same_moments(a.merge(b), cubn.moments(X))


def test_float64_and_float32_merge():
    merged = cubn.moments(X[:5].astype(np.float64)).merge(cubn.moments(X[5:], start=5))
    np.testing.assert_allclose(merged.mean, X.mean((0, 2)), rtol=1e-5)


def test_repr():
    assert repr(cubn.moments(X, start=2)) == "Moments(samples=[2, 13), num_features=3, count=55)"


def test_moments_cannot_be_written():
    moments = cubn.moments(np.ones((3, 4)))
    for values in (moments.mean, moments.m2):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1
