"""From shape and strides to samples, channels and positions."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cubn import _layout
from cubn._arrays import describe


@pytest.mark.parametrize(
    ("ndim", "given_axis", "axis"), [(2, 1, 1), (4, -1, 3), (4, -3, 1), (3, 0, 0), (3, np.int64(2), 2)]
)
def test_a_channel_axis_is_counted_from_either_end(ndim, given_axis, axis):
    assert _layout.channel_position(ndim, given_axis) == axis


@pytest.mark.parametrize("axis", [-5, 4, 100])
def test_a_channel_axis_that_is_not_there(axis):
    text = f"cubn: channel_axis must be at least -4 and below 4, x having 4 axes; got {axis}."
    with pytest.raises(np.exceptions.AxisError, match=f"^{re.escape(text)}$"):
        _layout.channel_position(4, axis)


@pytest.mark.parametrize(
    ("shape", "axis", "extents"),
    [
        ((2, 3), 1, (2, 3, 1)),
        ((2, 3), 0, (3, 2, 1)),
        ((2, 3, 4, 5), 1, (2, 3, 20)),
        ((2, 4, 5, 3), 3, (2, 3, 20)),
        ((3, 2, 4, 5), 0, (2, 3, 20)),
        ((0, 3, 4), 1, (0, 3, 4)),
        ((2, 3, 0, 4), 1, (2, 3, 0)),
    ],
)
def test_extents_are_samples_channels_and_positions(shape, axis, extents):
    assert _layout.extents(shape, axis) == extents


def operand(x, axis):
    return _layout.operand(describe(x, "x"), axis)[2:]


@pytest.mark.parametrize(
    ("shape", "axis", "steps"),
    [
        ((2, 3), 1, (3, 1, (), ())),
        ((2, 3, 1, 1), 1, (3, 1, (), ())),
        ((2, 3, 4, 5), 1, (60, 20, (20,), (1,))),
        ((2, 4, 5, 3), 3, (60, 1, (20,), (3,))),
        ((2, 4, 3, 5), 2, (60, 5, (4, 5), (15, 1))),
        ((3, 2, 4, 5), 0, (20, 40, (20,), (1,))),
        ((2, 3, 4, 1, 5), 1, (60, 20, (20,), (1,))),
        ((2, 3, 0, 5), 1, (15, 5, (0,), (1,))),
    ],
)
def test_steps_of_dense_arrays(shape, axis, steps):
    sample, channel, position_shape, position_strides = operand(np.zeros(shape, np.float32), axis)
    assert (position_shape, position_strides) == steps[2:]
    if math.prod(shape):
        assert (sample, channel) == steps[:2]


def test_views_have_the_steps_of_their_elements():
    x = np.zeros((2, 3, 4, 5), np.float32)
    assert operand(x[:, :, ::2], 1) == (60, 20, (2, 5), (10, 1))
    assert operand(x[:, ::-1, ::-1, ::-1], 1) == (60, -20, (20,), (-1,))
    assert operand(x.transpose(0, 1, 3, 2), 1) == (60, 20, (5, 4), (1, 5))
    assert operand(np.broadcast_to(x[:1, :, :1, :1], x.shape), 1) == (0, 20, (20,), (0,))


memories = st.tuples(
    st.lists(st.integers(1, 4), min_size=2, max_size=5), st.randoms(use_true_random=False), st.booleans()
)


def view(extents, random, dense):
    """An array of different numbers, its axes in memory in any order, with or without gaps, forwards or backwards."""
    order = random.sample(range(len(extents)), len(extents))
    gaps = [1 if dense else random.choice([1, 1, 2]) for _ in extents]
    memory = np.arange(math.prod(extents) * math.prod(gaps), dtype=np.float64)
    x = memory.reshape([extents[i] * gaps[i] for i in order])[tuple(slice(None, None, gaps[i]) for i in order)]
    x = x.transpose(np.argsort(order))
    if not dense:
        x = x[tuple(slice(None, None, random.choice([1, -1])) for _ in extents)]
    return x


@given(memories, st.integers(0, 4))
def test_an_operand_reaches_every_element_in_order(memory, axis):
    x = view(*memory)
    axis %= x.ndim
    array = describe(x, "x")
    N, C, S = _layout.extents(x.shape, axis)
    _, _, sample, channel, shape, strides = _layout.operand(array, axis)
    assert math.prod(shape) == S and 1 not in shape
    position = np.zeros(1, int)
    for n, stride in zip(shape, strides, strict=True):
        position = np.add.outer(position, stride * np.arange(n)).reshape(-1)
    steps = sample * np.arange(N)[:, None, None] + channel * np.arange(C)[:, None] + position
    first = x[(0,) * x.ndim]
    sample_axis = 1 if axis == 0 else 0
    np.testing.assert_array_equal(first + steps, np.moveaxis(x, (sample_axis, axis), (0, 1)).reshape(N, C, S))


@given(memories)
def test_dense_means_a_block_filled_once_forwards(memory):
    x = view(*memory)
    first = x[(0,) * x.ndim]
    filled = np.array_equal(np.sort(x, axis=None) - first, np.arange(x.size))
    strides = tuple(s // 8 for s in x.strides)
    assert _layout.is_dense(x.shape, strides) == filled


@given(memories)
def test_outputs_are_dense_whatever_the_input(memory):
    x = view(*memory)
    strides = tuple(s // 8 for s in x.strides)
    out = _layout.output_strides(x.shape, strides)
    assert _layout.is_dense(x.shape, out)
    assert out == (strides if _layout.is_dense(x.shape, strides) else _layout.c_strides(x.shape))


@pytest.mark.parametrize(
    ("shape", "strides", "out"),
    [
        ((0, 5, 2, 2), (20, 1, 10, 5), (20, 1, 10, 5)),
        ((3, 0, 2, 2), (4, 1, 2, 1), (4, 1, 2, 1)),
        ((3, 5, 0, 2), (10, 1, 10, 5), (10, 1, 10, 5)),
        ((0, 0, 2), (1, 2, 1), (1, 2, 1)),
        ((2, 0), (1, 5), (1, 5)),
        ((2, 3), (0, 1), (3, 1)),
        ((2, 0, 3), (-1, 7, 0), (3, 3, 1)),
        ((2, 0, 3), (3, 7, 1), (3, 7, 1)),
        ((0, 5, 2, 2), (0, 0, 0, 0), (0, 0, 0, 0)),
        ((4, 5, 0, 2), (0, 1, 10, 5), (0, 1, 10, 5)),
        ((4, 5, 2, 0), (0, 1, 0, 5), (0, 1, 0, 5)),
        ((0, 5, 4), (0, 8, 2), (20, 4, 1)),
        ((0, 5, 4), (40, 8, 2), (20, 4, 1)),
    ],
)
def test_outputs_without_elements_keep_a_layout_that_would_be_dense(shape, strides, out):
    assert _layout.output_strides(shape, strides) == out


@given(memories, st.integers(0, 4))
def test_an_empty_output_is_laid_out_as_torch_would(memory, axis):
    torch = pytest.importorskip("torch")
    x = view(*memory)
    strides = [max(s // 8, 1) for s in x.strides]
    shape = [0 if i == axis % x.ndim else extent for i, extent in enumerate(x.shape)]
    x = torch.empty_strided(shape, strides)
    if _layout.is_dense(x.shape, x.stride()):
        assert _layout.output_strides(tuple(shape), tuple(strides)) == torch.empty_like(x).stride()


def test_is_dense_at_the_edges():
    assert _layout.is_dense((2, 3), (3, 1)) and _layout.is_dense((2, 3), (1, 2))
    assert _layout.is_dense((1, 3), (99, 1)) and _layout.is_dense((1, 1), (0, -5))
    assert not _layout.is_dense((2, 3), (4, 1))
    assert not _layout.is_dense((2, 3), (0, 1))
    assert not _layout.is_dense((2, 3), (3, -1))


@pytest.mark.parametrize(
    ("shape", "strides", "distinct"),
    [
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), True),
        ((2, 3), (-6, 2), True),
        ((1, 3), (0, 1), True),
        ((2, 3), (0, 1), False),
        ((4, 3), (1, 1), False),
        ((2, 3), (2, 1), False),
        ((0, 3), (3, 1), True),
    ],
)
def test_elements_that_share_memory_are_seen(shape, strides, distinct):
    assert _layout.is_distinct(shape, strides) is distinct


@given(memories)
def test_a_span_reaches_from_the_first_byte_to_the_last(memory):
    x = view(*memory)
    first = x[(0,) * x.ndim]
    assert _layout.span(x.shape, tuple(s // 8 for s in x.strides)) == (x.min() - first, x.max() + 1 - first)


def test_span_of_nothing():
    assert _layout.span((2, 0), (5, 1)) == (0, 0)


def mask_operand(shape, x_shape, axis):
    mask = describe(np.zeros(shape, bool), "mask", ("bool",))
    found = _layout.mask_operand(mask, x_shape, axis)
    return found and found[1:]


@pytest.mark.parametrize(
    ("shape", "x_shape", "axis", "steps"),
    [
        ((2, 4, 5), (2, 3, 4, 5), 1, (20, 0, (20,), (1,))),
        ((2, 1, 4, 5), (2, 3, 4, 5), 1, (20, 0, (20,), (1,))),
        ((2, 4, 5), (2, 4, 5, 3), 3, (20, 0, (20,), (1,))),
        ((2, 4, 5), (3, 2, 4, 5), 0, (20, 0, (20,), (1,))),
        ((2, 1, 1), (2, 3, 4, 5), 1, (1, 0, (20,), (0,))),
        ((1, 4, 1), (2, 3, 4, 5), 1, (0, 0, (4, 5), (1, 0))),
        ((1, 1, 5), (2, 3, 4, 5), 1, (0, 0, (4, 5), (0, 1))),
        ((2,), (2, 3), 1, (1, 0, (), ())),
        ((2, 1), (2, 3), 1, (1, 0, (), ())),
    ],
)
def test_masks_are_broadcast_by_their_steps(shape, x_shape, axis, steps):
    assert mask_operand(shape, x_shape, axis) == ("bool", *steps)


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (2, 4), (2, 5, 4), (3, 4, 5), (), (2, 4, 5, 1), (2, 2, 4, 5), (1, 2, 1, 4, 5), (0, 4, 5)]
)
def test_masks_that_do_not_fit(shape):
    assert mask_operand(shape, (2, 3, 4, 5), 1) is None


def test_a_vector_has_the_step_of_its_elements():
    x = np.zeros(12, np.float32)
    array = describe(x[::-3], "gamma")
    assert _layout.vector(array) == (x[-1:].ctypes.data, "float32", -3)
