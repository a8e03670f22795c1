"""A batch of one value per channel, normalised by running statistics where that is asked for."""

import numpy as np
import pytest

import cubn
from tests.ops import arrays
from tests.ops.test_prepared_calls import only_the_short_way

C = 4


def state_of(like, **options):
    state = cubn.BatchNormState(C, like=like, **options)
    rng = np.random.default_rng(1)
    values = rng.normal(1, 0.5, (4, C)).astype(np.float32)
    library = arrays.library_of(like)
    state.gamma, state.beta, state.running_mean = (arrays.carry(v, library) for v in values[:3])
    state.running_var = arrays.carry(np.abs(values[3]), library)
    return state


def sample(library="numpy", shape=(1, C), seed=0):
    x, dy, residual = np.random.default_rng(seed).standard_normal((3, *shape)).astype(np.float32)
    return [arrays.carry(store, library) for store in (x, dy, residual)]


@pytest.mark.parametrize("library", arrays.LIBRARIES)
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_value_gives_what_forward_frozen_gives_and_counts_as_skipped(backend, library, groups, momentum):
    x, dy, residual = sample(library)
    state, frozen = (state_of(x, momentum=momentum) for _ in range(2))
    options = {"residual": residual, "relu": True}
    for turn in (1, 2):
        y, saved = cubn.forward_train(x, state, on_single="running", groups=groups, **options)
        want, saved_frozen = cubn.forward_frozen(x, frozen, **options)
        found = [y, *cubn.backward(dy, saved, statistics=True), saved.mean, saved.count]
        expected = [want, *cubn.backward(dy, saved_frozen, statistics=True), saved_frozen.mean, saved_frozen.count]
        for got, right in zip(found, expected, strict=True):
            arrays.assert_same(arrays.store_of(got), arrays.store_of(right))
        np.testing.assert_array_equal([state.tracked, state.skipped], np.full((2, C), turn))
        for name in ("running_mean", "running_var"):
            got, right = (arrays.store_of(getattr(of, name)) for of in (state, frozen))
            arrays.assert_same(got, right)
    assert "normalised by running statistics" in repr(saved)


def test_a_mask_on_the_host_decides_by_its_count():
    x, *_ = sample(shape=(3, C, 5))
    mask = np.zeros((3, 5), bool)
    mask[1, 2] = True
    state = state_of(x)
    y, _ = cubn.forward_train(x, state, mask=mask, on_single="running")
    arrays.assert_same(y, cubn.forward(x, state, mask=mask))
    assert (state.skipped == 1).all()
    mask[0, 0] = True  # now there are two
    y, saved = cubn.forward_train(x, state, mask=mask, on_single="running")
    assert saved.count == 2 and (state.skipped == 1).all() and (state.tracked == 2).all()


def test_without_an_update_nothing_is_counted(backend):
    x, *_ = sample()
    state = state_of(x)
    y, saved = cubn.forward_train(x, state, on_single="running", update=False)
    arrays.assert_same(y, cubn.forward(x, state))
    assert not state.tracked.any() and not state.skipped.any() and saved.count == 0


def test_y_may_be_written_over_x():
    x, dy, _ = sample()
    state = state_of(x)
    want = cubn.forward(x, state)
    y, saved = cubn.forward_train(x, state, on_single="running", out=x)
    assert y is x
    arrays.assert_same(y, want)
    with pytest.raises(ValueError, match="y was written over it"):
        cubn.backward(dy, saved)


def test_larger_batches_are_trained_on_as_ever(backend):
    x, *_ = sample(shape=(2, C))
    state, plain = state_of(x), state_of(x)
    for _ in range(2):
        y, _ = cubn.forward_train(x, state, on_single="running")
        arrays.assert_same(y, cubn.forward_train(x, plain)[0])
    np.testing.assert_equal(state.to_dict(), plain.to_dict())


def test_larger_batches_go_the_short_way_too():
    x, *_ = sample(shape=(2, C))
    state = state_of(x)
    cubn.forward_train(x, state)
    with only_the_short_way():
        cubn.forward_train(x, state, on_single="running")
        with pytest.raises(AssertionError, match="the full way"):
            cubn.forward_train(x, state, on_single="else")


@pytest.mark.parametrize("on_single", ["raise", "running"])
def test_an_empty_batch_is_refused_all_the_same(on_single):
    x, state = np.ones((0, C), np.float32), cubn.BatchNormState(C)
    with pytest.raises(ValueError, match="forward_train: x must have values to take statistics of; got 0"):
        cubn.forward_train(x, state, on_single=on_single)


def test_one_value_is_refused_by_default():
    x, *_ = sample()
    state = state_of(x)
    for options in ({}, {"on_single": "raise"}):
        with pytest.raises(ValueError, match="x must have more than one value per channel; got 1 "):
            cubn.forward_train(x, state, **options)
    assert not state.tracked.any()


@pytest.mark.parametrize("N", [1, 2])
def test_a_state_without_running_statistics_is_refused_at_once(N):
    """And not only where the last batch is short; in the short way too."""
    x, *_ = sample(shape=(N, C))
    state = cubn.BatchNormState(C, track=False)
    if N == 2:
        cubn.forward_train(x, state)
    text = "forward_train: state must have running statistics, for on_single='running'; got a state with track=False. "
    with pytest.raises(ValueError) as caught:
        cubn.forward_train(x, state, on_single="running")
    assert str(caught.value) == f"{text}Make the state with track=True."


@pytest.mark.parametrize(
    ("on_single", "error", "got"),
    [
        *(("skip", ValueError, "'skip'"), ("", ValueError, "''"), (None, TypeError, "None"), (True, TypeError, "True")),
        (np.array(["running"]), TypeError, "array(['running'], dtype='<U7')"),
    ],
    ids=str,
)
@pytest.mark.parametrize("warm", [False, True])
def test_other_words_are_refused(on_single, error, got, warm):
    x, *_ = sample(shape=(2, C))
    state = state_of(x)
    if warm:
        cubn.forward_train(x, state, update=False)
    before = state.to_dict()
    with pytest.raises(error) as caught:
        cubn.forward_train(x, state, update=False, on_single=on_single)
    assert str(caught.value) == f"forward_train: on_single must be 'raise' or 'running'; got {got}."
    np.testing.assert_equal(state.to_dict(), before)
