"""Nothing given to a state reaches a kernel unchecked: every attribute, argument, entry and pickled field."""

import copy
import fractions
import math
import pickle
import warnings

import numpy as np
import pytest

import cubn
from tests import oracle
from tests.ops.arrays import assert_same, carry

ARRAYS = ("gamma", "beta", "running_mean", "running_var")
COUNTERS = ("tracked", "skipped")
C = 4
X = np.random.default_rng(0).standard_normal((3, C, 2), dtype=np.float32)


def trained():
    state = cubn.BatchNormState(C)
    cubn.forward_train(X, state)
    return state


def misaligned(dtype):
    size = np.dtype(dtype).itemsize
    return np.zeros(size * C + 1, np.uint8)[1:].view(dtype)


class Pretender:
    """An object that says it is an array."""

    shape, dtype, strides = (C,), np.dtype("int64"), (8,)

    def __dlpack__(self, **options):
        raise BufferError("no memory")

    def __dlpack_device__(self):
        return 1, 0


NO_ARRAYS = {
    "number": 0.5,
    "text": "ones",
    "list": [1.0] * C,
    "mapping": {},
    "pretender": Pretender(),
    "too short": np.ones(C - 1, np.float32),
    "too long": np.ones(C + 1, np.float32),
    "one": np.ones(1, np.float32),
    "without axes": np.ones((), np.float32),
    "two axes": np.ones((C, 1), np.float32),
    "nothing": np.ones(0, np.float32),
    "int64": np.ones(C, np.int64),
    "bool": np.ones(C, bool),
    "complex": np.ones(C, complex),
    "object": np.array([1.0] * C, object),
    "swapped": np.ones(C, ">f4"),
    "masked": np.ma.ones(C),
    "matrix": np.ones((1, C)).view(np.matrix),
    "misaligned": misaligned("float32"),
}
NO_COUNTS = {
    "text": "3",
    "list": [0] * C,
    "bool": True,
    "float": 1.0,
    "not a number": float("nan"),
    "negative": -1,
    "too large": 1 << 62,
    "much too large": 10**30,
    "unprintable": 10**5000,
    "pretender": Pretender(),
    "too short": np.zeros(C - 1, np.int64),
    "one": np.zeros(1, np.int64),
    "two axes": np.zeros((C, 1), np.int64),
    "nothing": np.zeros(0, np.int64),
    "floats": np.zeros(C),
    "bools": np.zeros(C, bool),
    "unsigned": np.zeros(C, np.uint64),
    "objects": np.array([None] * C),
    "swapped": np.zeros(C, ">i8"),
    "negatives": np.array([0, 0, -5, 0]),
    "misaligned": misaligned("int64"),
}
WRONG = [(name, kind, NO_ARRAYS[kind]) for name in ARRAYS for kind in NO_ARRAYS]
WRONG += [(name, kind, NO_COUNTS[kind]) for name in COUNTERS for kind in NO_COUNTS]


def assigned(name, value):
    state = trained()
    setattr(state, name, value)


def from_arrays(name, value):
    given = {array: getattr(trained(), array) for array in ARRAYS}
    cubn.BatchNormState.from_arrays(**(given | {name: value}))


def from_dict(name, value):
    cubn.BatchNormState.from_dict(trained().to_dict() | {name: value})


def unpickled(name, value):
    written = trained().__getstate__()
    if name in ARRAYS:
        written["arrays"][name] = value
    else:
        written[name] = value
    cubn.BatchNormState.__new__(cubn.BatchNormState).__setstate__(written)


WAYS = (assigned, from_arrays, from_dict, unpickled)
LISTS_ARE_STORED = {("from_dict", "list")}  # by JSON


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "kind", "value"), [pytest.param(*w, id=f"{w[0]}-{w[1]}") for w in WRONG])
def test_what_does_not_fit_is_refused(name, kind, value, way):
    if (way.__name__, kind) in LISTS_ARE_STORED:
        return
    with pytest.raises((TypeError, ValueError, BufferError), match=r"^[\w.]+: .* must .*; got "):
        way(name, value)


@pytest.mark.parametrize("name", [*ARRAYS, *COUNTERS])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_other_libraries_wrong_arrays(library, name):
    library = pytest.importorskip("torch") if library == "torch" else pytest.importorskip("jax.numpy")
    wrong = [library.ones(C - 1), library.ones((C, 1)), library.ones(C, dtype=library.bool)]
    wrong.append(library.ones(C, dtype=library.int32 if name in ARRAYS else library.float32))
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=f"BatchNormState: {name} must"):
            assigned(name, value)


@pytest.mark.parametrize("name", [*ARRAYS, *COUNTERS])
def test_a_refused_value_changes_nothing(name):
    state = trained()
    before = copy.deepcopy(state.to_dict())
    for value in (NO_ARRAYS if name in ARRAYS else NO_COUNTS).values():
        with pytest.raises((TypeError, ValueError, BufferError)):
            setattr(state, name, value)
    np.testing.assert_equal(state.to_dict(), before)
    cubn.forward_train(X, state)


@pytest.mark.parametrize("name", ["running_mean", "running_var", *COUNTERS])
def test_statistics_and_their_counters_are_not_taken_away(name):
    """Updates would stop without a word."""
    with pytest.raises((TypeError, ValueError), match=r"must .*; got None"):
        setattr(trained(), name, None)


@pytest.mark.parametrize("name", COUNTERS)
def test_without_statistics_there_are_no_counters(name):
    state = cubn.BatchNormState(C, track=False)
    setattr(state, name, None)
    with pytest.raises(ValueError, match=f"{name} must be None; got a state with track=False"):
        setattr(state, name, 0)
    with pytest.raises(ValueError, match=f"{name} must be None"):
        cubn.BatchNormState.from_arrays(num_features=C, **{name: 0})
    assert getattr(state, name) is None


# --- counters -------------------------------------------------------------------------------------------------------


def counts_of(kind):
    values = np.array([3, 4, 5, 6])
    match kind:
        case "int":
            return 3, np.full(C, 3)
        case "numpy scalar":
            return np.int64(3), np.full(C, 3)
        case "no axes":
            return np.array(3), np.full(C, 3)
        case "int32":
            return values.astype(np.int32), values
        case "strided":
            return np.repeat(values, 3)[::3], values
        case "backwards":
            return values[::-1].copy()[::-1], values
        case "read-only":
            given = values.copy()
            given.flags.writeable = False
            return given, values
        case "torch":
            return pytest.importorskip("torch").from_numpy(values), values
        case "torch, a number":
            return pytest.importorskip("torch").tensor(3), np.full(C, 3)
        case "jax":
            return pytest.importorskip("jax.numpy").array(values), values
    return values, values


KINDS = ["int", "numpy scalar", "no axes", "int64", "int32", "strided", "backwards", "read-only"]
KINDS += ["torch", "torch, a number", "jax"]


@pytest.mark.parametrize("kind", KINDS)
def test_counters_are_copied(kind):
    given, values = counts_of(kind)
    before = copy.deepcopy(given)
    state = cubn.BatchNormState(C, momentum=None)
    state.tracked, state.skipped = given, 1
    assert_same(state.tracked, values.astype(np.int64))
    cubn.forward_train(X, state)
    assert_same(state.tracked, values.astype(np.int64) + 1)
    assert_same(state.skipped, np.ones(C, np.int64))
    np.testing.assert_array_equal(np.asarray(given), np.asarray(before))
    weight = 1 / (values + 1 - 1)
    np.testing.assert_allclose(state.running_mean, weight * X.mean((0, 2)), rtol=1e-5)


def test_narrow_counters_count_right():
    """Twenty batches of means 10 and 13 average to that."""
    state = cubn.BatchNormState(2, momentum=None)
    state.tracked = np.zeros(2, np.int32)
    x = np.array([[10.0, 13.0], [10.0, 13.0]], np.float32)
    for _ in range(20):
        cubn.forward_train(x, state)
    assert state.running_mean.tolist() == [10, 13] and state.tracked.tolist() == [20, 20]


@pytest.mark.parametrize("name", COUNTERS)
def test_what_is_read_of_a_counter_is_apart(name):
    """No edit of it is lost without a word, and none reaches the state."""
    state = trained()
    read = getattr(state, name)
    with pytest.raises(ValueError, match="read-only"):
        read[:] = 7
    before = copy.deepcopy(state.to_dict())
    read.flags.writeable = True
    read.resize(1, refcheck=False)
    np.testing.assert_equal(state.to_dict(), before)
    cubn.forward_train(X, state)


def test_more_skipped_than_seen():
    state = trained()
    text = r"tracked must be at least skipped; got 2 skipped of 1 tracked in channel 0. reset\(statistics=False\)"
    with pytest.raises(ValueError, match=text):
        state.skipped = 2
    with pytest.raises(ValueError, match="tracked must be at least skipped"):
        cubn.BatchNormState.from_dict(state.to_dict() | {"skipped": np.array([0, 0, 2, 0])})
    assert not state.skipped.any()


# --- what happens to arrays in a state ------------------------------------------------------------------------------


def reshaped(array):
    array.shape = (2, 2)


def retyped(array):
    array.dtype = np.int32


def restrided(array):
    array.strides = (0,)


IN_PLACE = {
    "shorter": lambda array: array.resize(2, refcheck=False),
    "longer": lambda array: array.resize(400_000, refcheck=False),
    "reshaped": reshaped,
    "retyped": retyped,
}
OPERATIONS = {
    "forward": lambda state: cubn.forward(X, state),
    "forward_frozen": lambda state: cubn.forward_frozen(X, state),
    "forward_train": lambda state: cubn.forward_train(X, state),
    "update": lambda state: cubn.update(state, cubn.moments(X)),
    "reset": lambda state: state.reset(),
    "fold": cubn.fold,
    "to_dict": lambda state: state.to_dict(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("how", IN_PLACE)
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_was_changed_in_place_is_noticed(name, how, operation):
    state = trained()
    OPERATIONS["forward"](state)
    IN_PLACE[how](getattr(state, name))
    with pytest.raises((TypeError, ValueError), match=f"{name} must have (shape|dtype)"):
        OPERATIONS[operation](state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_new_strides_are_followed():
    state = trained()
    state.gamma = np.arange(1, C + 1, dtype=np.float32)
    cubn.forward(X, state)
    restrided(state.gamma)
    other = state.copy()
    other.gamma = np.ones(C, np.float32)
    assert_same(cubn.forward(X, state), cubn.forward(X, other))


@pytest.mark.parametrize("operation", ["forward_train", "update", "reset"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_became_read_only(name, operation):
    state = trained()
    before = copy.deepcopy(state.to_dict())
    getattr(state, name).flags.writeable = False
    with pytest.raises(ValueError, match=f"{operation}: {name} must be writable"):
        OPERATIONS[operation](state)
    np.testing.assert_equal(state.to_dict(), before)
    getattr(state, name).flags.writeable = True
    OPERATIONS[operation](state)


def test_a_failed_second_init_leaves_nothing_that_does_not_fit():
    state = trained()
    with pytest.raises(ValueError):
        state.__init__(400_000, eps=-1.0)
    assert cubn.forward(X, state).shape == X.shape
    with pytest.raises(ValueError):
        cubn.forward(np.ones((1, 400_000), np.float32), state)


# --- options --------------------------------------------------------------------------------------------------------

NO_NUMBERS = {"text": "1", "bool": True, "none": None, "complex": 1j, "array": np.ones(1), "list": [1]}
OUT_OF_RANGE = {
    "num_features": [0, -1, 2**48, 2**63, 10**400, 10**5000],
    "eps": [0.0, -1e-5, float("nan"), float("inf"), 10**400, 10**5000, fractions.Fraction(10**400)],
    "momentum": [-0.1, 1.1, float("nan"), float("inf"), 10**400],
    "channel_axis": [2**63, -(2**63), 10**5000],
    "running_variance": ["Unbiased", ""],
}


def made(**options):
    return cubn.BatchNormState(**({"num_features": C} | options))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{i}")
        for name in OUT_OF_RANGE
        for i, value in enumerate(OUT_OF_RANGE[name])
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^BatchNormState: {name} must .*; got ") as caught:
        made(**{name: value})
    assert len(str(caught.value)) < 250
    if name != "num_features":
        with pytest.raises(ValueError, match=rf"^BatchNormState: {name} must"):
            setattr(trained(), name, value)
    if name != "momentum":
        with pytest.raises(ValueError, match=rf"^BatchNormState: {name} must"):
            from_dict(name, value)


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("name", ["num_features", "eps", "momentum", "channel_axis"])
def test_options_that_are_no_numbers_are_refused(name, kind):
    if (name, kind) == ("momentum", "none"):
        return
    with pytest.raises(TypeError, match=rf"^BatchNormState: {name} must"):
        made(**{name: NO_NUMBERS[kind]})


@pytest.mark.parametrize("value", [1, None, ["biased"], np.array("biased")])
def test_words_that_are_none_are_refused(value):
    with pytest.raises(TypeError, match="BatchNormState: running_variance must be 'unbiased' or 'biased'; got"):
        made(running_variance=value)


@pytest.mark.parametrize("name", ["affine", "track"])
@pytest.mark.parametrize("value", ["no", 0, None, np.zeros(2)])
def test_flags_are_true_or_false(name, value):
    with pytest.raises(TypeError, match=f"BatchNormState: {name} must be True or False; got"):
        made(**{name: value})


@pytest.mark.parametrize("name", ["statistics", "counters"])
def test_flags_of_reset(name):
    with pytest.raises(TypeError, match=f"reset: {name} must be True or False; got"):
        trained().reset(**{name: 1})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_by_their_own_names(dtype):
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    for given in (getattr(np, dtype), np.dtype(dtype), getattr(torch, dtype), getattr(jnp, dtype), dtype):
        assert made(dtype=given).gamma.dtype == dtype
        assert cubn.moments(np.ones((2, 3), np.int8), dtype=given).mean.tolist() == [1, 1, 1]


class Vague:
    """An object whose dtype and text are errors."""

    @property
    def dtype(self):
        raise AttributeError

    def __repr__(self):
        raise RuntimeError


NO_DTYPES = [
    "float16",
    np.float16,
    np.int32,
    ">f4",
    np.dtype(">f8"),
    "float128x",
    3,
    10**5000,
    True,
    ["float32"],
    "x",
    math,
    {},
    {"names": 3},
    Vague(),
    Vague,
]


@pytest.mark.parametrize("dtype", NO_DTYPES, ids=lambda dtype: type(dtype).__name__)
def test_dtypes_that_are_none_of_these(dtype):
    with pytest.raises(TypeError, match="BatchNormState: dtype must be 'float32' or 'float64'; got"):
        made(dtype=dtype)
    with pytest.raises(TypeError, match="moments: dtype must be 'float32' or 'float64'; got"):
        cubn.moments(X, dtype=dtype)


def test_no_dtype_of_a_state():
    with pytest.raises(TypeError, match="BatchNormState: dtype must be 'float32' or 'float64'; got None"):
        made(dtype=None)


def test_more_channels_than_memory():
    with pytest.raises(MemoryError, match="Unable to allocate"):
        made(num_features=2**47)


@pytest.mark.parametrize("d", [None, 3, [("eps", 1)], "state"])
def test_what_is_no_dictionary(d):
    with pytest.raises(TypeError, match="from_dict: d must be a mapping, as from to_dict; got"):
        cubn.BatchNormState.from_dict(d)


def test_momentum_is_no_matter_without_statistics():
    state = cubn.BatchNormState(C, track=False, momentum=7)
    state.momentum = -3
    y, _ = cubn.forward_train(X, state)
    assert_same(y, cubn.forward_train(X, cubn.BatchNormState(C, track=False))[0])
    assert cubn.BatchNormState.from_arrays(num_features=C, momentum=7).momentum == 7


# --- values of running statistics -----------------------------------------------------------------------------------

STATISTICS = {"running_mean": np.zeros(C, np.float32), "running_var": np.array([1, -0.5, 2, -1e-9], np.float32)}
NEGATIVE = r"running_var must be 0 or more, but is negative in channels 1, 3; got a \w+ array"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_a_negative_variance_is_refused(library, dtype):
    pytest.importorskip(library)
    if dtype == "bfloat16" and library != "torch":
        pytest.skip("as torch's")
    torch = pytest.importorskip("torch")
    bad = {name: carry(v, "torch").to(getattr(torch, dtype)) for name, v in STATISTICS.items()}
    if library != "torch":
        bad = {name: carry(v.numpy(), library) for name, v in bad.items()}
    negative = NEGATIVE if dtype != "float16" else NEGATIVE.replace("channels 1, 3", "channels? 1.*")
    with pytest.raises(ValueError, match=f"BatchNormState: {negative}.*check=False"):
        cubn.BatchNormState.from_arrays(**bad)
    state = cubn.BatchNormState.from_arrays(**bad, check=False)
    with pytest.raises(ValueError, match=f"fold: {negative}"):
        cubn.fold(state)
    written = state.to_dict()
    with pytest.raises(ValueError, match=f"BatchNormState: {negative}"):
        cubn.BatchNormState.from_dict(written)
    again = cubn.BatchNormState.from_dict(written, check=False)
    np.testing.assert_equal(again.to_dict(), written)


def test_a_negative_variance_is_not_assigned():
    state = trained()
    before = copy.deepcopy(state.to_dict())
    with pytest.raises(ValueError, match=f"BatchNormState: {NEGATIVE}"):
        state.running_var = STATISTICS["running_var"]
    np.testing.assert_equal(state.to_dict(), before)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_broken_state_is_copied_as_it_is(how):
    broken = {"running_mean": np.full(C, np.nan), "running_var": np.full(C, -1.0)}
    state = cubn.BatchNormState.from_arrays(**broken, momentum=0.5, check=False)
    np.testing.assert_equal(how(state).to_dict(), state.to_dict())


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_come_with_a_warning(name, value):
    bad = {"running_mean": np.zeros(C), "running_var": np.ones(C)}
    bad[name][2] = value
    text = f"BatchNormState: {name} is not finite in channel 2"
    with pytest.warns(cubn.StateWarning, match=text) as caught:
        state = cubn.BatchNormState.from_arrays(**bad)
    assert caught[0].filename == __file__ and len(caught) == 1
    with pytest.warns(cubn.StateWarning, match=text) as caught:
        setattr(state, name, bad[name].copy())
    assert caught[0].filename == __file__
    with pytest.warns(cubn.StateWarning, match=text) as caught:
        cubn.BatchNormState.from_dict(state.to_dict())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cubn.BatchNormState.from_arrays(**bad, check=False)
        cubn.BatchNormState.from_dict(state.to_dict(), check=False)
        state.gamma = np.ones(C)
        cubn.forward(X, state)
        cubn.forward_train(X, state)
        cubn.fold(state)
        state.copy()


def test_a_warning_that_is_an_error_leaves_the_state():
    state = trained()
    before = copy.deepcopy(state.to_dict())
    with pytest.raises(cubn.StateWarning):  # as in all these tests
        state.running_mean = np.full(C, np.nan, np.float32)
    np.testing.assert_equal(state.to_dict(), before)


def test_forward_of_a_state_that_was_broken_in_place_is_what_the_formula_gives():
    state = trained()
    state.running_var[:] = [-0.5, -9.99e-6, np.nan, np.inf]
    state.running_mean[3] = -np.inf
    statistics = oracle.frozen_statistics(state.running_mean, state.running_var, state.eps)
    y = cubn.forward(X, state)
    assert_same(y, oracle.normalize(X, statistics, state.gamma, state.beta))
    assert np.isnan(y[:, [0, 2, 3]]).all() and np.isfinite(y[:, 1]).all()
    assert_same(cubn.forward_frozen(X, state)[0], y)
    assert repr(state).endswith(
        "; running_mean not finite in channel 3; running_var not finite in channels 2, 3; "
        "running_var negative in channels 0, 1; tracked 1; skipped 0)"
    )


# --- repr -----------------------------------------------------------------------------------------------------------


def test_repr_says_what_there_is():
    torch = pytest.importorskip("torch")
    state = cubn.BatchNormState.from_arrays(
        gamma=torch.ones(3, dtype=torch.bfloat16),
        running_mean=np.zeros(3),
        running_var=np.ones(3),
        momentum=None,
        eps=0.5,
        channel_axis=-1,
        running_variance="biased",
        tracked=np.array([3, 4, 3]),
        skipped=1,
    )
    assert repr(state) == (
        "BatchNormState(3, eps=0.5, momentum=None, channel_axis=-1, running_variance='biased'; "
        "gamma: torch bfloat16 on cpu; running_mean, running_var: numpy float64 on cpu; tracked 3 to 4; skipped 1)"
    )
    assert repr(cubn.BatchNormState(3, affine=False, track=False)).endswith("channel_axis=1; no arrays)")


def test_repr_of_many_broken_channels_is_short():
    state = cubn.BatchNormState(5000)
    state.running_mean[:] = np.nan
    assert "running_mean not finite in channels 0, 1, 2, 3, 4, 5, 6, 7 and 4992 more" in repr(state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_repr_of_a_state_that_cannot_be_used():
    state = trained()
    jnp = pytest.importorskip("jax.numpy")
    state.beta = jnp.zeros(C)
    state.beta.delete()
    state.gamma.dtype = np.int32
    assert "gamma: unusable, TypeError; beta: unusable, ValueError; running_mean, running_var: numpy" in repr(state)
