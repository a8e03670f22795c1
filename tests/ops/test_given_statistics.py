"""Gradients where statistics are given: by the running ones after forward_frozen, and without a Saved."""

import numpy as np
import pytest

import cubn
from cubn.sync import threads
from tests.ops import arrays

C, EPS = 7, 1e-3


def values(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def frozen_state(dtype="float64", affine=True):
    parameters = {"gamma": values(1, C), "beta": values(2, C)} if affine else {}
    running = {"running_mean": values(3, C), "running_var": values(4, C) ** 2 + 0.5}
    return {name: array.astype(dtype) for name, array in (parameters | running).items()}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_by_frozen_statistics_are_those_of_finite_differences(backend, relu, affine):
    x, dy = values(5, 6, C, 4), values(6, 6, C, 4)
    given = frozen_state(affine=affine)

    def loss(**changed):
        state = cubn.BatchNormState.from_arrays(**(given | changed), eps=EPS)
        return (cubn.forward(x, state, relu=relu) * dy).sum()

    _, saved = cubn.forward_frozen(x, cubn.BatchNormState.from_arrays(**given, eps=EPS), relu=relu)
    gradients = cubn.backward(dy, saved, statistics=True)
    step = 1e-6
    for name, found in (("running_mean", gradients.dmean), ("running_var", gradients.dvar)):
        for channel in range(C):
            ends = [given[name].copy() for _ in range(2)]
            ends[0][channel] -= step
            ends[1][channel] += step
            low, high = (loss(**{name: end}) for end in ends)
            assert found[channel] == pytest.approx((high - low) / (2 * step), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("library", arrays.LIBRARIES)
def test_gradients_by_statistics_are_like_the_statistics(backend, library):
    given = {name: arrays.carry(array, library) for name, array in frozen_state("float32").items()}
    x = values(5, 6, C, 4).astype(np.float32)
    _, saved = cubn.forward_frozen(x, cubn.BatchNormState.from_arrays(**given))
    plain, gradients = cubn.backward(x, saved), cubn.backward(x, saved, statistics=True)
    for name in ("dmean", "dvar"):
        found = getattr(gradients, name)
        assert arrays.library_of(found) == library
        assert arrays.store_of(found).dtype == np.float32 and found.shape == (C,)
    for name in ("dx", "dgamma", "dbeta"):
        arrays.assert_same(arrays.store_of(getattr(gradients, name)), arrays.store_of(getattr(plain, name)), name)


@pytest.mark.parametrize("whose", ["local", "global"])
def test_gradients_by_statistics_of_several_ranks(whose):
    """The sums of all ranks have the bits of one process; a rank's own are those of its samples."""
    x, dy = values(5, 6, C, 4), values(6, 6, C, 4)
    given = frozen_state()

    def gradients(part, **options):
        _, saved = cubn.forward_frozen(x[part], cubn.BatchNormState.from_arrays(**given), **options)
        return cubn.backward(dy[part], saved, statistics=True, parameter_gradients=whose)

    def rank(comm):
        return gradients(slice(0, 2) if comm.rank == 0 else slice(2, 6), comm=comm)

    found = threads.run(2, rank)
    expected = [gradients(slice(0, 6))] * 2 if whose == "global" else [gradients(slice(0, 2)), gradients(slice(2, 6))]
    for part, whole in zip(found, expected, strict=True):
        for name in ("dmean", "dvar", "dgamma", "dbeta"):
            if whose == "global":
                arrays.assert_same(getattr(part, name), getattr(whole, name), name)
            else:  # another order of blocks than in a batch of its own
                np.testing.assert_allclose(getattr(part, name), getattr(whole, name), rtol=1e-12, atol=1e-13)


def test_gradients_are_four_unless_those_by_statistics_are_asked_for():
    """So that `dx, dgamma, dbeta, dresidual = backward(...)` is right, however the gradients are taken."""
    x, given = values(0, 4, C), {"mean": np.zeros(C), "invstd": np.ones(C), "frozen": True}

    def gradients(comm, **statistics):
        _, saved = cubn.forward_frozen(x, cubn.BatchNormState(C), comm=comm)
        return [
            cubn.backward(x, saved, **statistics),
            cubn.backward_from(x, x, **given, **statistics),
            *([] if comm is None else [cubn.backward_start(x, saved, **statistics).finish()]),
        ]

    def rank(comm):
        return gradients(comm), gradients(comm, statistics=True)

    for plain, by_statistics in (rank(None), *threads.run(1, rank)):
        assert {type(found) for found in plain} == {cubn.Gradients}
        assert {type(found) for found in by_statistics} == {cubn.StatisticsGradients}
    names = ("dx", "dgamma", "dbeta", "dresidual")
    assert cubn.Gradients._fields == names
    assert cubn.StatisticsGradients._fields == (*names, "dmean", "dvar")


def test_gradients_by_statistics_of_nothing(backend):
    _, saved = cubn.forward_frozen(np.zeros((0, C), np.float32), cubn.BatchNormState(C))
    gradients = cubn.backward(np.zeros((0, C), np.float32), saved, statistics=True)
    assert (gradients.dmean == 0).all() and (gradients.dvar == 0).all()


def test_a_batch_s_own_statistics_have_no_gradient():
    _, saved = cubn.forward_train(values(0, 4, C), cubn.BatchNormState(C))
    text = r"^backward: statistics must be False unless the statistics are frozen; got True\. What passes"
    with pytest.raises(ValueError, match=text):
        cubn.backward(values(0, 4, C), saved, statistics=True)


@pytest.mark.parametrize("operation", ["forward_train", "forward_frozen"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("affine", ["both", "gamma", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_from_given_statistics_has_the_bits_of_backward(backend, operation, masked, relu, affine, dtype):
    x, dy = (arrays.carry(arrays.normal(np.random.default_rng(n), (9, C, 5), dtype), "numpy") for n in range(2))
    mask = values(3, 9, 5) > -1 if masked else None
    parameters = {"gamma": values(1, C), "beta": values(2, C).astype(np.float32)}
    parameters = {name: parameters[name] for name in {"both": ("gamma", "beta"), "none": ()}.get(affine, (affine,))}
    frozen = operation == "forward_frozen"
    running = {"running_mean": values(4, C), "running_var": values(5, C) ** 2} if frozen or not parameters else {}
    state = cubn.BatchNormState.from_arrays(**parameters, **running, eps=EPS)
    _, saved = getattr(cubn, operation)(x, state, mask=mask, relu=relu)
    expected = cubn.backward(dy, saved, statistics=frozen)
    options = {"mask": mask, "relu": relu, "frozen": frozen, "statistics": frozen, **parameters}
    found = cubn.backward_from(dy, x, mean=saved.mean, invstd=saved.invstd, **options)
    for name, value in expected._asdict().items():
        if value is None:
            assert getattr(found, name) is None, name
        else:
            arrays.assert_same(arrays.store_of(getattr(found, name)), arrays.store_of(value), name)


def test_from_given_statistics_into_dy_and_of_another_axis():
    x, dy = values(0, 4, 3, C).astype(np.float32), values(1, 4, 3, C).astype(np.float32)
    _, saved = cubn.forward_train(x, cubn.BatchNormState(C, channel_axis=-1))
    expected = cubn.backward(dy, saved).dx
    options = {"mean": saved.mean, "invstd": saved.invstd, "channel_axis": -1}
    assert cubn.backward_from(dy, x, **options, out=dy).dx is dy
    arrays.assert_same(dy, expected)


def test_count_is_what_sums_are_divided_by():
    x, dy = values(0, 6, 1), np.ones((6, 1))
    mean, invstd = np.zeros(1), np.ones(1)
    for count in (6, 12):
        found = cubn.backward_from(dy, x, mean=mean, invstd=invstd, count=count)
        expected = dy - dy.sum() / count - x * (dy * x).sum() / count
        np.testing.assert_allclose(found.dx, expected, rtol=1e-12, atol=1e-12)
    frozen = cubn.backward_from(dy, x, mean=mean, invstd=invstd, count=12, frozen=True)
    arrays.assert_same(frozen.dx, dy)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"mean": np.zeros(C + 1)}, ValueError, "mean must have shape (7,), one value per channel"),
        ({"invstd": np.zeros(())}, ValueError, "invstd must have shape (7,), one value per channel"),
        ({"mean": [0.0] * C}, TypeError, "mean must be an array with __dlpack__"),
        ({"mean": None}, TypeError, "mean must be an array with __dlpack__"),
        ({"invstd": np.ones(C, np.int64)}, TypeError, "invstd must have dtype float16"),
        ({"gamma": np.ones(3)}, ValueError, "gamma must have shape (7,)"),
        ({"count": 0}, ValueError, "count must be 1 or more and less than 2**63; got 0."),
        ({"count": 2**63}, ValueError, "count must be 1 or more and less than 2**63; got 9223372036854775808."),
        ({"count": 2.0}, TypeError, "count must be an integer; got 2.0."),
        ({"relu": "no"}, TypeError, "relu must be True or False; got 'no'."),
        ({"frozen": 1}, TypeError, "frozen must be True or False; got 1."),
        ({"statistics": True}, ValueError, "statistics must be False unless the statistics are frozen"),
        ({"dy": np.zeros((4, C, 2))}, ValueError, "dy must have x's shape (4, 7)"),
        ({"out": np.zeros((4, C), np.float32)}, TypeError, "out must have x's dtype float64"),
    ],
)
def test_statistics_that_do_not_fit(changed, error, text):
    arguments = {"dy": np.ones((4, C)), "x": np.ones((4, C)), "mean": np.zeros(C), "invstd": np.ones(C)} | changed
    with pytest.raises(error) as caught:
        cubn.backward_from(arguments.pop("dy"), arguments.pop("x"), **arguments)
    assert str(caught.value).startswith(f"backward_from: {text}")
