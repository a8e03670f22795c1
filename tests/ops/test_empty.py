"""Batches of zero samples or zero positions: empty results, zero gradients, nothing learned."""

import itertools

import numpy as np
import pytest

import cubn
from tests.ops.arrays import assert_same, carry, library_of
from tests.ops.test_on_device import device, remote  # noqa: F401

SHAPES = [(0, 4), (0, 4, 2), (3, 4, 0), (2, 4, 0, 3)]
OPTIONS = list(itertools.product([False, True], repeat=3))


@pytest.fixture
def state():
    state = cubn.BatchNormState(4)
    cubn.update(state, cubn.moments(np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)))
    return state


def options(x, relu, residual, mask):
    shape = x.shape[:1] + x.shape[2:]
    return {
        "relu": relu,
        "residual": x.copy() if residual else None,
        "mask": np.ones(shape, bool) if mask else None,
    }


@pytest.mark.parametrize(("relu", "residual", "mask"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_of_nothing_is_nothing(state, shape, relu, residual, mask):
    x = np.zeros(shape, np.float32)
    given = options(x, relu, residual, mask)
    of_data = cubn.moments(np.random.default_rng(1).standard_normal((5, 4)))
    for y in (cubn.forward(x, state, **given), cubn.normalize(x, of_data, **given)):
        assert y.shape == shape and y.dtype == np.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_written_in_place(state, shape):
    x = np.zeros(shape, np.float32)
    assert cubn.forward(x, state, out=x) is x


@pytest.mark.parametrize(("relu", "residual", "mask"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fine_tuning_on_nothing_has_gradients_of_zero(state, shape, relu, residual, mask):
    x = np.zeros(shape, np.float32)
    y, saved = cubn.forward_frozen(x, state, **options(x, relu, residual, mask))
    gradients = cubn.backward(y, saved)
    assert gradients.dx.shape == shape
    assert_same(gradients.dgamma, np.zeros(4, np.float32))
    assert_same(gradients.dbeta, np.zeros(4, np.float32))
    assert residual == (gradients.dresidual is not None)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"renorm": (3, 5)}, {"on_single": "running"}], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_needs_no_count_behind_a_mask_on_a_device(shape, options):
    here = cubn.BatchNormState(4)
    state = cubn.BatchNormState.from_arrays(
        running_mean=remote(here.running_mean), running_var=remote(here.running_var)
    )
    mask = remote(np.ones(shape[:1] + shape[2:], bool))
    with pytest.raises(ValueError, match="x must have values to take statistics of; got 0 where the mask is True"):
        cubn.forward_train(remote(np.zeros(shape, np.float32)), state, mask=mask, **options)
    assert not state.tracked.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_learned_from_nothing(state, shape):
    before = state.to_dict()
    cubn.update(state, cubn.moments(np.zeros(shape, np.float32)))
    assert_same(state.running_mean, before["running_mean"])
    assert_same(state.running_var, before["running_var"])
    assert_same(state.skipped, before["skipped"] + 1)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_of_other_libraries_stays_in_them(state, shape, library):
    pytest.importorskip(library)
    x = carry(np.zeros(shape, np.float32), library)
    y = cubn.forward(x, state)
    assert library_of(y) == library and tuple(y.shape) == shape
