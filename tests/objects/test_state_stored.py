"""A state's dictionary: what is in it, where it can be stored without pickle, and what comes back."""

import io
import json

import numpy as np
import pytest

import cubn
from tests.ops import arrays
from tests.ops.arrays import carry

ARRAYS = ("gamma", "beta", "running_mean", "running_var")
X = np.random.default_rng(0).standard_normal((5, 4, 3), dtype=np.float32)
STATES = {
    "all": {},
    "cumulative": {"momentum": None},
    "no parameters": {"affine": False},
    "no statistics": {"track": False},
    "options alone": {"affine": False, "track": False, "momentum": None},
    "biased": {"running_variance": "biased", "dtype": "float64"},
}


def trained(**options):
    state = cubn.BatchNormState(4, **options)
    cubn.forward_train(X, state)
    return state


def through_numpy(state):
    file = io.BytesIO()
    np.savez(file, **state.to_dict())
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return cubn.BatchNormState.from_dict(stored)


def through_torch(state):
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    torch.save(state.to_dict(like=torch.zeros(1)), file)
    file.seek(0)
    return cubn.BatchNormState.from_dict(torch.load(file, weights_only=True))


def through_json(state):
    lists = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in state.to_dict().items()}
    found = json.loads(json.dumps(lists, allow_nan=False))
    dtype = np.float32 if state.gamma is None else state.gamma.dtype
    return cubn.BatchNormState.from_dict(
        found | {name: np.array(found[name], dtype) for name in ARRAYS if name in found}
    )


@pytest.mark.parametrize("way", [through_numpy, through_torch, through_json])
@pytest.mark.parametrize("kind", STATES)
def test_a_dictionary_is_stored_without_pickle(kind, way):
    state = trained(**STATES[kind])
    again = way(state)
    np.testing.assert_equal(again.to_dict(), state.to_dict())
    assert repr(again) == repr(state)


def test_what_a_state_has_not_is_left_out():
    held = trained(**STATES["options alone"]).to_dict()
    assert held == {"num_features": 4, "eps": 1e-5, "channel_axis": 1, "running_variance": "unbiased"}
    assert {name: type(value) for name, value in trained().to_dict().items()} == {
        **{"num_features": int, "eps": float, "momentum": float, "channel_axis": int, "running_variance": str},
        **dict.fromkeys((*ARRAYS, "tracked", "skipped"), np.ndarray),
    }


def test_numpy_numbers_become_plain():
    state = cubn.BatchNormState(np.int64(4), eps=np.float32(0.5), momentum=np.float64(0.5), channel_axis=np.int8(1))
    held = state.to_dict()
    assert [type(held[name]) for name in ("num_features", "eps", "momentum", "channel_axis")] == [
        int,
        float,
        float,
        int,
    ]


def test_a_dictionary_with_none_objects_loads():
    """As former versions wrote it, by way of numpy.savez as well."""
    held = trained(momentum=None, affine=False).to_dict()
    old = {"momentum": None, "gamma": None, "beta": None} | held
    del old["running_variance"]
    file = io.BytesIO()
    np.savez(file, **old)
    file.seek(0)
    for stored in (old, np.load(file, allow_pickle=True)):
        np.testing.assert_equal(cubn.BatchNormState.from_dict(stored).to_dict(), held)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_restored_beside_an_array(library):
    pytest.importorskip(library)
    x = carry(X, library)
    state = cubn.BatchNormState.from_dict(trained().to_dict(), like=x)
    assert {arrays.library_of(getattr(state, name)) for name in ARRAYS} == {library}
    np.testing.assert_equal(state.to_dict(), trained().to_dict())
    y, saved = cubn.forward_train(x, state)
    assert arrays.library_of(cubn.backward(y, saved).dgamma) == library


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_written_beside_an_array(library):
    pytest.importorskip(library)
    held = trained(dtype="float64").to_dict(like=carry(X, library))
    for name in (*ARRAYS, "tracked", "skipped"):
        assert arrays.library_of(held[name]) == library
    assert str(held["tracked"].dtype).endswith("int64") and str(held["gamma"].dtype).endswith("float64")
    plain = cubn.BatchNormState.from_dict(held)
    assert {type(getattr(plain, name)) for name in ARRAYS} == {np.ndarray}
    np.testing.assert_equal(plain.to_dict(), trained(dtype="float64").to_dict())


def test_a_restored_state_is_apart():
    held = trained().to_dict()
    before = {name: np.array(value) for name, value in held.items()}
    cubn.forward_train(X, cubn.BatchNormState.from_dict(held))
    np.testing.assert_equal({name: np.array(value) for name, value in held.items()}, before)


def test_a_misspelt_entry_is_refused():
    held = trained().to_dict()
    held["gama"] = held.pop("gamma")
    text = "from_dict: d must have the entries of to_dict and no others; got gama. Correct its name, or leave it out."
    with pytest.raises(ValueError, match=text):
        cubn.BatchNormState.from_dict(held)


@pytest.mark.parametrize("name", ["num_features", "eps", "channel_axis", "tracked", "skipped"])
def test_a_missing_entry(name):
    held = trained().to_dict()
    del held[name]
    with pytest.raises(KeyError, match=f"got no {name}"):
        cubn.BatchNormState.from_dict(held)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_half_of_the_running_statistics(name):
    held = trained().to_dict()
    del held[name]
    with pytest.raises(ValueError, match=f"{name} must be given together with"):
        cubn.BatchNormState.from_dict(held)


@pytest.mark.parametrize("name", [*ARRAYS, "tracked", "skipped"])
def test_lists_of_no_shape_are_refused(name):
    text = rf"^BatchNormState: {name} must be an array, or lists of one shape; got \[1, \[2\]\]\."
    with pytest.raises(ValueError, match=text):
        cubn.BatchNormState.from_dict(trained().to_dict() | {name: [1, [2]]})


@pytest.mark.parametrize("name", [*ARRAYS, "tracked", "skipped"])
@pytest.mark.parametrize("nested", [False, True])
def test_keys_are_no_numbers(name, nested):
    jax = pytest.importorskip("jax")
    keys = jax.random.split(jax.random.key(0), 4)
    with pytest.raises((TypeError, ValueError), match=rf"^BatchNormState: {name} must (have dtype|be an array)"):
        cubn.BatchNormState.from_dict(trained().to_dict() | {name: list(keys) if nested else keys})


@pytest.mark.parametrize("name", [*ARRAYS, "tracked", "skipped"])
def test_parameters_that_are_still_to_be_initialized(name):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=rf"^BatchNormState: {name} must be initialized"):
        cubn.BatchNormState.from_dict(trained().to_dict() | {name: torch.nn.UninitializedParameter()})
