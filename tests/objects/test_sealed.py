"""What a user can reach of Saved and Moments leads nowhere near the memory that native code reads."""

import contextlib
import copy
import gc
import pickle

import numpy as np
import pytest

import cubn
from tests.ops.arrays import assert_same

WRONG = [None, 3, [1.0], np.zeros(1), np.zeros((), np.int32), np.zeros(2)[::-1], "memory"]


@pytest.fixture
def saved():
    """Of a residual ReLU, so that every field is in use; of arrays too large for NumPy's cache of small memory."""
    x, residual = np.random.default_rng(0).standard_normal((2, 4, 400, 3), dtype=np.float32)
    return cubn.forward_train(x, cubn.BatchNormState(400), residual=residual, relu=True)[1]


@pytest.fixture
def moments():
    return cubn.moments(np.random.default_rng(0).standard_normal((4, 400, 3)))


def names_of(thing):
    """Every attribute, of which methods are none of the concern here."""
    return [name for name in dir(thing) if not name.startswith("__") and not callable(getattr(thing, name))]


def damage(array):
    """What NumPy lets a user do to an array that he was given, and to the array that it is a view of."""
    for target in (array, array.base):
        if not isinstance(target, np.ndarray):
            continue
        for harm in (
            lambda a: a.resize(0, refcheck=False),
            lambda a: a.resize(1 << 16, refcheck=False),
            lambda a: a.setflags(write=True),
            lambda a: setattr(a, "dtype", np.uint8),
            lambda a: setattr(a, "strides", (0,) * a.ndim),
            lambda a: setattr(a, "shape", (a.size, 1)),
        ):
            with contextlib.suppress(ValueError, AttributeError, TypeError, DeprecationWarning):
                harm(target)
        with contextlib.suppress(ValueError):
            target[...] = 0


def arrays_of(thing):
    """The arrays among the attributes, and in the tuples there."""
    for name in names_of(thing):
        value = getattr(thing, name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, np.ndarray) and part is not getattr(thing, "x", None):
                yield name, part


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: type(w).__name__)
def test_no_attribute_of_saved_can_be_set(saved, wrong):
    dy = np.ones_like(saved.x)
    before = cubn.backward(dy, saved)
    for name in [*names_of(saved), "statistics", "source", "gate", "parameters"]:
        with pytest.raises(AttributeError):
            setattr(saved, name, wrong)
        with pytest.raises(AttributeError):
            delattr(saved, name)
    assert_same(cubn.backward(dy, saved).dx, before.dx)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_arrays_of_saved_are_not_those_that_backward_reads(saved):
    dy = np.ones_like(saved.x)
    before = cubn.backward(dy, saved)
    found = list(arrays_of(saved))
    assert {name for name, _ in found} == {"count", "mean", "var", "invstd", "relu_bits"}
    for _, array in found:
        damage(array)
    del found
    gc.collect()
    filler = [np.full(n, np.nan) for n in (1, 400, 404, 1616, 4800) for _ in range(8)]
    after = cubn.backward(dy, saved)
    for name in ("dx", "dgamma", "dbeta", "dresidual"):
        assert_same(getattr(after, name), getattr(before, name), name)
    assert len(filler) == 40


def test_a_saved_comes_from_a_forward_alone(saved):
    for arguments in ((), (saved,), (1, 2, 3)):
        with pytest.raises(TypeError, match=r"^Saved: only forward_train and forward_frozen make one"):
            cubn.Saved(*arguments)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.copy(saved)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: type(w).__name__)
def test_no_attribute_of_moments_can_be_set(moments, wrong):
    x, state = np.ones((2, 400), np.float32), cubn.BatchNormState(400)
    for name in names_of(moments):
        with pytest.raises(AttributeError):
            setattr(moments, name, wrong)
        with pytest.raises(AttributeError):
            delattr(moments, name)
    assert cubn.normalize(x, moments).shape == x.shape
    cubn.update(state, moments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_arrays_of_moments_are_not_those_that_update_reads(moments):
    x = np.random.default_rng(1).standard_normal((3, 400))
    mean, m2, y = moments.mean.copy(), moments.m2.copy(), cubn.normalize(x, moments)
    for _, array in arrays_of(moments):
        damage(array)
    for array in (moments.mean, moments.m2, *moments.to_dict().values()):
        if isinstance(array, np.ndarray):
            damage(array)
    assert_same(moments.mean, mean)
    assert_same(moments.m2, m2)
    assert_same(cubn.normalize(x, moments), y)


def test_moments_come_from_samples_or_checked_statistics(moments):
    for arguments in ((), (0, 4, moments._nodes), (moments,)):
        with pytest.raises(TypeError, match=r"^Moments: cubn.moments\(x\), Moments.from_statistics and"):
            cubn.Moments(*arguments)
    assert not hasattr(moments, "__setstate__")


@pytest.mark.parametrize("kind", [cubn.Saved, cubn.Moments])
def test_no_class_says_other_things_of_its_arrays(kind):
    with pytest.raises(TypeError, match="can be derived from"):
        type("Other", (kind,), {"mean": property(lambda self: np.zeros(1))})


@pytest.mark.parametrize("name", ["x", "mask"])
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.resize(1, refcheck=False),
        lambda a: a.resize(2 * a.size, refcheck=False),
        lambda a: setattr(a, "shape", (a.size, 1)),
    ],
    ids=["shrunk", "grown", "reshaped"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_array_whose_memory_went_is_not_read(name, change):
    arrays = {"x": np.ones((4, 400, 3), np.float32), "mask": np.ones((4, 3), bool)}
    _, saved = cubn.forward_train(arrays["x"], cubn.BatchNormState(400), mask=arrays["mask"])
    change(arrays[name])
    with pytest.raises((ValueError, TypeError), match=rf"^backward: {name} must be as it was in the forward"):
        cubn.backward(np.ones((4, 400, 3), np.float32), saved)


class Forged:
    """A pickle that asks for Moments of anything."""

    def __init__(self, entries):
        self.entries = entries

    def __reduce__(self):
        return cubn.Moments.from_dict, (self.entries,)


BAD_ENTRIES = {
    "a mean of no axes": {"mean": np.zeros(())},
    "a mean of one axis": {"mean": np.zeros(3)},
    "fewer rows of mean": {"mean": np.zeros((1, 3))},
    "more channels of m2": {"m2": np.zeros((2, 4))},
    "no channels": {"mean": np.zeros((2, 0)), "m2": np.zeros((2, 0))},
    "a mean of integers": {"mean": np.zeros((2, 3), np.int64)},
    "a mean of objects": {"mean": np.full((2, 3), None)},
    "half an m2": {"m2": np.zeros((2, 3), np.float16)},
    "a negative m2": {"m2": np.full((2, 3), -1.0)},
    "counts of floats": {"count": np.ones(2)},
    "too many counts": {"count": np.ones(3, np.int64)},
    "negative counts": {"count": np.array([1, -1])},
    "counts beyond int64": {"count": np.full(2, 2**62)},
    "blocks of three": {"blocks": np.zeros((2, 3), np.int64)},
    "blocks that overlap": {"blocks": np.array([[0, 4], [0, 2]])},
    "blocks that are not aligned": {"blocks": np.array([[0, 4], [5, 7]])},
    "blocks of other sizes": {"blocks": np.array([[0, 3], [4, 6]])},
    "blocks before the start": {"start": 1},
    "blocks after the stop": {"stop": 5},
    "a stop beyond int64": {"stop": 2**64},
    "a start of a half": {"start": 0.5},
    "a start that is True": {"start": True},
    "two starts": {"start": np.zeros(2, np.int64)},
    "an exact of a word": {"exact": "no"},
    "blocks of none": {"exact": False},
    "text": {"count": "many"},
    "nothing": {"m2": None},
}


@pytest.mark.parametrize("entries", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_moments_of_forged_entries_are_refused(entries):
    written = cubn.moments(np.arange(18.0).reshape(6, 3)).to_dict()
    assert written["blocks"].tolist() == [[0, 4], [4, 6]]
    for forged in (written | entries, pickle.dumps(Forged(written | entries))):
        with pytest.raises((TypeError, ValueError), match=r"^from_dict: "):
            pickle.loads(forged) if isinstance(forged, bytes) else cubn.Moments.from_dict(forged)


@pytest.mark.parametrize("d", [None, 3, [("start", 0)]])
def test_moments_of_no_mapping(d):
    with pytest.raises(TypeError, match=r"^from_dict: d must be a mapping"):
        cubn.Moments.from_dict(d)


def test_moments_of_another_mapping():
    with pytest.raises(KeyError, match="no start, stop, exact, blocks, m2"):
        cubn.Moments.from_dict({"count": 3, "mean": 4})


# --- what they look like ---------------------------------------------------------------------------------------------


def test_a_repr_has_shapes_and_no_numbers(saved):
    assert repr(saved) == (
        "Saved(x=float32 (4, 400, 3), gamma=float32 (400,), beta=float32 (400,), mask=None, residual=True, relu=True, "
        "normalised by its own statistics)"
    )
    assert repr(cubn.backward(np.ones_like(saved.x), saved)) == (
        "Gradients(dx=float32 (4, 400, 3), dgamma=float32 (400,), dbeta=float32 (400,), dresidual=float32 (4, 400, 3))"
    )


def test_a_repr_of_other_libraries_arrays():
    torch = pytest.importorskip("torch")
    x = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    _, saved = cubn.forward_frozen(x, cubn.BatchNormState(3, affine=False), mask=np.ones((2, 4), bool))
    assert repr(saved) == (
        "Saved(x=bfloat16 (2, 3, 4), gamma=None, beta=None, mask=bool (2, 4), residual=False, relu=False, "
        "normalised by running statistics)"
    )
    assert repr(cubn.backward(x, saved)).startswith("Gradients(dx=bfloat16 (2, 3, 4), dgamma=None,")
    text = repr(cubn.backward(x, saved, statistics=True))
    assert text.startswith("StatisticsGradients(dx=bfloat16 (2, 3, 4), dgamma=None,")
    assert text.endswith(", dmean=float32 (3,), dvar=float32 (3,))")
