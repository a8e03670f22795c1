"""Arrays of one call in different layouts, nchw and nhwc: the same bits, and not by the general kernel."""

import numpy as np
import pytest

import cubn
from cubn.backends.cpu import compile as compiling
from cubn.backends.cpu import plan, pool
from tests.ops import arrays, cases
from tests.ops.pairwise import every_pair, others_full

OTHERS = {"nchw": "channels_last", "channels_last": "dense"}
"""The memory in which others are then in the other layout, by that of x."""

AXES = {
    "operation": cases.AXES["operation"],
    "dtype": arrays.DTYPES,
    "layout": list(OTHERS),
    "channels": [1, 3, 16, 17, 64, 150],
    "positions": [1, 7, 49, 64, 3000],
    "residual": [False, True],
    "relu": [False, True],
    "out": ["fresh", "given", "residual"],
    "threads": [1, 2, 3],
}
ALIKE = {
    "library": "numpy",
    "mask": "none",
    "affine": "both",
    "parameters": "float32",
    "momentum": 0.1,
    "cut": "whole",
}


def allowed(row):
    return row.get("residual") is not False or row.get("out") != "residual"


ROWS = [(row,) for seed in range(3) for row in every_pair(AXES, allowed, seed)]
DEFAULT = range(len(every_pair(AXES, allowed, 0)))


@pytest.mark.parametrize("row", others_full(ROWS, DEFAULT), ids=lambda row: "-".join(map(str, row.values())))
def test_no_bit_depends_on_which_array_has_which_layout(row, monkeypatch, eager_threads):
    shape = (2, row["channels"], row["positions"])
    monkeypatch.setitem(cases.SHAPES, "mixed", shape)
    cases.run({**ALIKE, **row, "shape": "mixed", "others": OTHERS[row["layout"]]})


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_share_a_copy_as_shipped(dtype, layout, monkeypatch):
    """Larger than what one thread takes, with odd ends of channels and positions in the last blocks."""
    monkeypatch.setitem(cases.SHAPES, "mixed", (5, 2 * plan.RELAID_EDGE + 3, 37, 7))
    row = {"operation": "train", "dtype": dtype, "layout": layout, "threads": 3, "residual": True, "relu": True}
    cases.run({**ALIKE, **row, "out": "given", "shape": "mixed", "others": OTHERS[layout]})


# --- which kernels compute --------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(plans_anew, monkeypatch):
    """Names of the kernels of all launches that are prepared."""
    found, prepare = [], pool.prepare

    def recorded(program):
        names = {kernel.address: name for name, kernel in compiling._kernels.items()}
        found.extend(names[stage.kernel.address] for stage in program.stages)
        return prepare(program)

    monkeypatch.setattr(pool, "prepare", recorded)
    return found


SHAPE = (3, 20, 6, 7)
GENERAL, COPY = "strided", "relayout"


def placed(memory, seed):
    return arrays.in_memory(arrays.normal(np.random.default_rng(seed), SHAPE), memory, 1)


def train(x, other, others):
    y, saved = cubn.forward_train(x, cubn.BatchNormState(20), residual=other(1), relu=True, out=others and other(2))
    return y, *cubn.backward(other(3), saved, out=others and other(4))


def frozen(x, other, others):
    """With gradients of the statistics, for which the parts of a backward are launched one by one."""
    y, saved = cubn.forward_frozen(x, cubn.BatchNormState(20), residual=other(1), relu=True, out=others and other(2))
    gradients = cubn.backward(other(3), saved, statistics=True, out=others and other(4))
    return y, *(getattr(gradients, name) for name in ("dx", "dgamma", "dbeta", "dresidual", "dmean", "dvar"))


def forward(x, other, others):
    return (cubn.forward(x, cubn.BatchNormState(20), residual=other(1), out=others and other(2)),)


def normalize(x, other, others):
    return (cubn.normalize(x, cubn.moments(x), residual=other(1), out=others and other(2)),)


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("others", [None, True], ids=["fresh", "given"])
@pytest.mark.parametrize("call", [train, frozen, forward, normalize])
def test_the_other_layout_is_copied_and_not_left_to_the_general_kernel(call, others, layout, kernels):
    memory = arrays.LAYOUTS[layout][1]
    x = placed(memory, 0)
    expected = call(x, lambda seed: placed(memory, seed), others)
    assert not any(COPY in name for name in kernels)
    for got, wanted in zip(call(x, lambda seed: placed(OTHERS[layout], seed), others), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    copied = {name.removeprefix("relayout-float32-")[0] for name in kernels if COPY in name}
    assert copied == ({"g", "y"} if others else {"g"})
    assert not any(GENERAL in name for name in kernels)


def test_gradients_of_what_is_not_dense_are_copied_too(kernels):
    """They are C-contiguous then, dresidual as well as dx."""
    x = placed("channels_last", 0)[::2]
    y, saved = cubn.forward_train(x, cubn.BatchNormState(20), residual=x, relu=True)
    gradients = cubn.backward(x, saved)
    dense = np.ascontiguousarray(x)
    expected, saved = cubn.forward_train(dense, cubn.BatchNormState(20), residual=dense, relu=True)
    for got, wanted in zip((y, *gradients), (expected, *cubn.backward(dense, saved)), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert any(f"{COPY}-float32-r" in name for name in kernels)
    assert not any(GENERAL in name for name in kernels)


@pytest.mark.parametrize("memory", ["sliced", "negative", "permuted"])
def test_other_strides_are_left_to_the_general_kernel(memory, kernels):
    """Also where there are others in the other layout beside them."""
    x = placed("channels_last", 0)
    cubn.forward(x, cubn.BatchNormState(20), residual=placed(memory, 1), out=placed("dense", 2))
    assert any(GENERAL in name for name in kernels)
    assert not any(COPY in name for name in kernels)


def test_nothing_is_copied_where_there_is_a_mask(kernels):
    x, mask = placed("channels_last", 0), np.ones((3, 6, 7), bool)
    cubn.forward(x, cubn.BatchNormState(20), residual=placed("dense", 1), mask=mask)
    assert any(GENERAL in name for name in kernels)
    assert not any(COPY in name for name in kernels)


@pytest.mark.parametrize("dtype", arrays.DTYPES)
@pytest.mark.parametrize(("channels", "positions"), [(20, 42), (3, 42), (20, 5), (3, 5), (130, 70)])
@pytest.mark.parametrize("layout", OTHERS)
def test_nothing_but_the_elements_of_an_output_is_written(layout, channels, positions, dtype, kernels):
    """Of memory with room after each channel and each position of an output in the other layout."""
    values = arrays.normal(np.random.default_rng(0), (2, channels, positions), dtype)
    x = arrays.carry(arrays.in_memory(values, arrays.LAYOUTS[layout][1], 1), "numpy")
    extents = (positions, channels) if layout == "nchw" else (channels, positions)
    memory = np.full((2, extents[0] + 1, extents[1] + 1), 7, x.dtype)
    out = memory[:, :-1, :-1]
    y = out.swapaxes(1, 2) if layout == "nchw" else out
    state = cubn.BatchNormState(channels)
    cubn.forward(x, state, out=y)
    arrays.assert_same(arrays.store_of(np.ascontiguousarray(y)), arrays.store_of(cubn.forward(x.copy("C"), state)))
    assert any(COPY in name for name in kernels)
    assert (memory[:, -1] == 7).all() and (memory[:, :, -1] == 7).all()
