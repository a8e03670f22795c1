"""Moments as values: of nothing, merged from either side, added, pickled, written down, of other people's numbers."""

import copy
import io
import itertools
import json
import pickle

import numpy as np
import pytest

import cubn
from tests import oracle
from tests.ops import arrays
from tests.ops.arrays import assert_same

X = np.random.default_rng(0).standard_normal((11, 3, 5)).astype(np.float32)


def assert_same_moments(a, b):
    assert (a.start, a.stop, a.num_features, a.count) == (b.start, b.stop, b.num_features, b.count)
    assert_same(a.mean, b.mean, "mean")
    assert_same(a.m2, b.m2, "m2")


def test_moments_are_those_of_the_textbook():
    m, x = cubn.moments(X), X.astype(np.float64)
    assert m.count == 55 and m.count.dtype == np.int64
    np.testing.assert_allclose(m.mean, x.mean((0, 2)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(m.var(), x.var((0, 2)), rtol=2e-7)
    np.testing.assert_allclose(m.var_unbiased(), x.var((0, 2), ddof=1), rtol=2e-7)
    assert {a.dtype for a in (m.mean, m.m2, m.var(), m.var_unbiased())} == {np.dtype(np.float64)}


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (0, 3)])
def test_moments_of_nothing_are_zero(shape):
    m = cubn.moments(np.zeros(shape, np.float32), start=6)
    assert (m.start, m.stop, m.count) == (6, 6 + shape[0], 0)
    assert_same(m.mean, np.zeros(3))
    assert_same(m.m2, np.zeros(3))
    assert np.isnan(m.var()).all() and np.isnan(m.var_unbiased()).all()


def test_one_value_has_no_unbiased_variance():
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


def test_repr_says_range_and_count():
    assert repr(cubn.moments(X, start=2)) == "Moments(samples=[2, 13), num_features=3, count=55)"


def test_moments_cannot_be_written():
    moments = cubn.moments(np.ones((3, 4)))
    for values in (moments.mean, moments.m2):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


# --- without a range ------------------------------------------------------------------------------------------------


def test_std_is_the_root_of_var():
    m = cubn.moments(X)
    assert_same(m.std(), np.sqrt(m.var()))
    assert np.isnan(cubn.moments(X[:0]).std()).all()


def test_a_sum_is_of_all_values_in_any_order():
    parts = [cubn.moments(X[a:b].astype(np.float64)) for a, b in ((4, 11), (0, 3), (3, 3), (3, 4))]
    x = X.astype(np.float64)
    for order in itertools.permutations(parts):
        whole = sum(order)
        assert not whole.exact and whole.count == 55 and whole.num_features == 3
        np.testing.assert_allclose(whole.mean, x.mean((0, 2)), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(whole.var(), x.var((0, 2)), rtol=1e-12)
    assert_same(sum([parts[0]]).mean, parts[0].mean)


def test_a_sum_with_nothing_has_the_same_numbers():
    m, nothing = cubn.moments(X), cubn.moments(X[:0])
    for pooled in (m + nothing, nothing + m):
        assert_same(pooled.mean, m.mean)
        assert_same(pooled.m2, m.m2)
    assert (nothing + nothing).count == 0


def test_a_sum_has_no_range():
    pooled = cubn.moments(X[:4]) + cubn.moments(X[4:])
    assert (pooled.start, pooled.stop, pooled.exact) == (0, 0, False)
    assert repr(pooled) == "Moments(num_features=3, count=55, exact=False)"
    for a, b in ((pooled, cubn.moments(X)), (cubn.moments(X[:0]), pooled), (pooled, pooled)):
        with pytest.raises(ValueError, match=r"^merge: other must be of a range of samples, .* Add Moments without a"):
            a.merge(b)


def test_moments_are_added_to_moments_alone():
    m = cubn.moments(X)
    for other in (1, 0.0, None, np.float64(1), False):
        with pytest.raises(TypeError):
            m + other
        with pytest.raises(TypeError):
            other + m
    with pytest.raises(ValueError, match=r"^\+: other must have 3 channels"):
        m + cubn.moments(X[:, :2])
    most = cubn.Moments.from_statistics(2**62 - 1, np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match=r"^\+: other must leave fewer than 2\*\*62 values in all"):
        most + m


@pytest.mark.parametrize("library", arrays.LIBRARIES)
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_from_statistics_gives_the_statistics_back(library, dtype):
    mean, var = (arrays.normal(np.random.default_rng(n), 4, dtype) for n in range(2))
    var = np.abs(oracle.widen(var)).astype(var.dtype) if var.dtype != np.uint16 else var & 0x7FFF
    m = cubn.Moments.from_statistics(10, arrays.carry(mean, library), arrays.carry(var, library))
    assert (m.count, m.exact) == (10, False)
    assert_same(m.mean, oracle.widen(mean).astype(np.float64))
    assert_same(m.m2, oracle.widen(var).astype(np.float64) * 10)


def test_statistics_of_a_stream_normalise_and_update():
    x = X.astype(np.float64)
    m = cubn.Moments.from_statistics(55, x.mean((0, 2)), x.var((0, 2)))
    np.testing.assert_allclose(cubn.normalize(x, m), cubn.normalize(x, cubn.moments(x)), rtol=1e-12, atol=1e-12)
    states = [cubn.BatchNormState(3, dtype="float64") for _ in range(2)]
    for state, taken in zip(states, (m, cubn.moments(x)), strict=True):
        cubn.update(state, taken)
    np.testing.assert_allclose(states[0].running_var, states[1].running_var, rtol=1e-12)
    np.testing.assert_allclose(states[0].running_mean, states[1].running_mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("count", "mean", "var", "error", "text"),
    [
        (0, np.zeros(2), np.ones(2), ValueError, "count must be at least 1 and less than 2**62; got 0."),
        (
            2**62,
            np.zeros(2),
            np.ones(2),
            ValueError,
            "count must be at least 1 and less than 2**62; got 46116860184273",
        ),
        (2.0, np.zeros(2), np.ones(2), TypeError, "count must be an integer; got 2.0."),
        (True, np.zeros(2), np.ones(2), TypeError, "count must be an integer; got True."),
        (3, [0.0], np.ones(1), TypeError, "mean must be an array with __dlpack__; got a list."),
        (3, np.zeros(2, int), np.ones(2), TypeError, "mean must have dtype float16, bfloat16, float32 or float64"),
        (3, np.zeros(2), np.ones(3), ValueError, "var must have shape (C,), one value per channel, as the other"),
        (3, np.zeros((2, 1)), np.ones((2, 1)), ValueError, "mean must have shape (C,)"),
        (3, np.zeros(0), np.ones(0), ValueError, "mean must have shape (C,)"),
        (3, np.zeros(()), np.ones(()), ValueError, "mean must have shape (C,)"),
        (
            3,
            np.zeros(3),
            -np.eye(3)[1],
            ValueError,
            "var must be 0 or more, as a sum of squares is; got less in channels",
        ),
    ],
)
def test_statistics_that_are_none(count, mean, var, error, text):
    with pytest.raises(error) as caught:
        cubn.Moments.from_statistics(count, mean, var)
    assert str(caught.value).startswith(f"from_statistics: {text}")


def test_statistics_that_are_not_finite_are_kept_out_of_a_state():
    m = cubn.Moments.from_statistics(9, np.array([1.0, np.nan, 1.0]), np.array([4.0, 4.0, np.inf]))
    state = cubn.BatchNormState(3)
    cubn.update(state, m)
    assert state.skipped.tolist() == [0, 1, 1]


# --- written down ---------------------------------------------------------------------------------------------------


def samples_apart():
    """Moments whose blocks leave samples without positions between them."""
    return cubn.moments(X[:3]).merge(cubn.moments(X[:2, :, :0], start=3)).merge(cubn.moments(X[3:], start=5))


KINDS = {
    "a range": lambda: cubn.moments(X, start=5),
    "nothing": lambda: cubn.moments(X[:0], start=2),
    "no positions": lambda: cubn.moments(X[:, :, :0]),
    "samples apart": samples_apart,
    "a sum": lambda: cubn.moments(X) + cubn.moments(X),
    "statistics": lambda: cubn.Moments.from_statistics(3, np.ones(3), np.ones(3)),
}


def stored(m):
    file = io.BytesIO()
    np.savez(file, **m.to_dict())
    file.seek(0)
    return cubn.Moments.from_dict(np.load(file, allow_pickle=False))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "way", [stored, lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy], ids=["savez", "pickle", *"cd"]
)
def test_written_down_and_read_again(make, way):
    m = make()
    again = way(m)
    assert_same_moments(again, m)
    assert again.exact is m.exact and again._nodes.blocks == m._nodes.blocks
    assert_same(again._nodes.table.view(np.int64), m._nodes.table.view(np.int64))


def test_read_again_from_lists_and_from_tensors():
    torch = pytest.importorskip("torch")
    m = cubn.moments(X)
    written = m.to_dict()
    lists = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in written.items()}
    tensors = {name: torch.tensor(v, requires_grad=name in ("mean", "m2")) for name, v in written.items()}
    for d in (json.loads(json.dumps(lists)), tensors):
        assert_same_moments(cubn.Moments.from_dict(d), m)


@pytest.mark.parametrize("name", ["blocks", "count", "mean", "m2"])
def test_lists_of_no_shape_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"^from_dict: {name} must be an array, or lists of one shape; got \[\[1, 2\], \[3\]\]"
    ):
        cubn.Moments.from_dict(cubn.moments(X).to_dict() | {name: [[1, 2], [3]]})


def test_what_was_written_down_merges_on():
    assert_same_moments(stored(cubn.moments(X[:5])).merge(stored(cubn.moments(X[5:], start=5))), cubn.moments(X))


# --- integers, and what is not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"])
@pytest.mark.parametrize("dtype", ["float32", "float64", np.float64, np.dtype("float32")])
def test_integers_are_converted_when_asked(library, kind, dtype):
    x = np.random.default_rng(0).integers(0, 2 if kind == "bool" else 100, (6, 3, 4)).astype(kind)
    mask = np.arange(24).reshape(6, 4) % 5 > 0
    module = pytest.importorskip(library if library != "jax" else "jax.numpy")
    given = module.from_numpy(x) if library == "torch" else module.array(x)
    assert_same_moments(
        cubn.moments(given, dtype=dtype, mask=mask, start=3),
        cubn.moments(x.astype(dtype), mask=mask, start=3),
    )


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
def test_narrow_floats_are_widened_when_asked(kind):
    x = arrays.normal(np.random.default_rng(0), (6, 3, 4), kind)
    wide = oracle.widen(x).astype(np.float64)
    assert_same_moments(cubn.moments(arrays.carry(x, "numpy"), dtype="float64"), cubn.moments(wide))


@pytest.mark.parametrize(
    ("x", "dtype", "remedy"),
    [
        (np.full((2, 1), 2**24 + 1), "float32", "Use dtype='float64'."),
        (np.full((2, 1), -(2**24) - 1), "float32", "Use dtype='float64'."),
        (np.full((2, 1), 2**53 + 1), "float64", "Convert it first, if rounding is meant."),
        (np.full((2, 1), -(2**63)), "float64", "Convert it first, if rounding is meant."),
        (np.full((2, 1), 2**64 - 1, np.uint64), "float64", "Convert it first, if rounding is meant."),
        (np.ones((2, 1)), "float32", "Use dtype='float64'."),
    ],
)
def test_a_conversion_that_would_round_is_refused(x, dtype, remedy):
    with pytest.raises(ValueError) as caught:
        cubn.moments(x, dtype=dtype)
    rule = f"moments: x must hold numbers that {dtype} can hold exactly"
    assert str(caught.value) == f"{rule}; got values of {x.dtype} (shape=(2, 1)). {remedy}"


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
@pytest.mark.parametrize("axis", [1, -1, 0])
def test_a_finite_mask_leaves_out_what_is_not(library, dtype, axis):
    x = arrays.normal(np.random.default_rng(0), (8, 3, 5), dtype, wild=0.05)
    finite = np.isfinite(oracle.widen(x)).all(axis)
    given = arrays.carry(x, library)
    mask = cubn.finite_mask(given, channel_axis=axis)
    assert arrays.library_of(mask) == library
    assert_same(np.asarray(mask), finite)
    assert not finite.all() and finite.any()
    moments = cubn.moments(given, channel_axis=axis, mask=mask)
    assert moments.count == finite.sum() and np.isfinite(moments.mean).all()


def test_a_finite_mask_of_what_is_no_x():
    with pytest.raises(ValueError, match=r"^finite_mask: x must have 2 axes or more"):
        cubn.finite_mask(np.ones(3))
    with pytest.raises(np.exceptions.AxisError, match=r"^finite_mask: channel_axis"):
        cubn.finite_mask(np.ones((3, 2)), channel_axis=2)


class Untyped:
    @property
    def dtype(self):
        raise RuntimeError("not yet")


@pytest.mark.parametrize("dtype", [np, Untyped(), "float32 "], ids=["module", "raises", "space"])
def test_what_has_a_dtype_that_is_none(dtype):
    with pytest.raises(TypeError, match=r"^BatchNormState: dtype must be 'float32' or 'float64'; got"):
        cubn.BatchNormState(2, dtype=dtype)
    with pytest.raises(TypeError, match=r"^moments: dtype must be 'float32' or 'float64'; got"):
        cubn.moments(np.ones((2, 2)), dtype=dtype)
