"""The state: its arrays in any library, in place or replaced; updates; copies; and what Saved keeps of it."""

import copy
import json
import pickle
from contextlib import contextmanager

import numpy as np
import pytest

import cubn
from cubn import _calls
from tests import oracle
from tests.ops import arrays
from tests.ops.arrays import assert_same, carry, store_of

ARRAYS = ("gamma", "beta", "running_mean", "running_var")


def batch(seed=0, shape=(5, 4, 3), dtype="float32"):
    return arrays.normal(np.random.default_rng(seed), shape, dtype, centre=1.0, scale=2.0)


def trained(**options):
    state = cubn.BatchNormState(4, **options)
    for seed in range(3):
        cubn.forward_train(batch(seed), state)
    return state


def same_states(a, b):
    np.testing.assert_equal(a.to_dict(), b.to_dict())
    return True


# --- making one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_new_state_has_ones_and_zeros(dtype):
    state = cubn.BatchNormState(4, dtype=dtype)
    for name, value in zip(ARRAYS, (1, 0, 0, 1), strict=True):
        assert_same(getattr(state, name), np.full(4, value, dtype), name)
    assert_same(state.tracked, np.zeros(4, np.int64))
    assert_same(state.skipped, np.zeros(4, np.int64))
    assert (state.num_features, state.eps, state.momentum, state.channel_axis) == (4, 1e-5, 0.1, 1)


def test_without_parameters_and_statistics():
    state = cubn.BatchNormState(4, affine=False, track=False)
    assert all(getattr(state, name) is None for name in (*ARRAYS, "tracked", "skipped"))
    x = batch()
    y, saved = cubn.forward_train(x, state)
    assert_same(y, cubn.normalize(x, cubn.moments(x)))
    assert cubn.backward(x, saved)[1:] == (None, None, None)
    assert state.running_mean is None and state.tracked is None


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_beside_an_array(library):
    pytest.importorskip(library)
    state = cubn.BatchNormState(4, like=carry(batch(), library))
    assert {arrays.library_of(getattr(state, name)) for name in ARRAYS} == {library}
    assert same_states(state, cubn.BatchNormState(4))


def test_beside_a_parameter():
    torch = pytest.importorskip("torch")
    assert isinstance(cubn.BatchNormState(4, like=torch.nn.Parameter(torch.zeros(2))).gamma, torch.Tensor)


def test_repr_says_options_and_arrays():
    options = "BatchNormState(4, eps=1e-05, momentum=0.1, channel_axis=1"
    assert repr(cubn.BatchNormState(4, track=False)) == f"{options}; gamma, beta: numpy float32 on cpu)"


@pytest.mark.parametrize("names", [("gamma",), ("beta",), ("running_mean", "running_var"), ARRAYS])
def test_from_arrays_holds_the_arrays_themselves(names):
    given = {name: np.ones(4, np.float32) for name in names}
    state = cubn.BatchNormState.from_arrays(**given, eps=1e-3, momentum=None, channel_axis=-1)
    assert all(getattr(state, name) is given.get(name) for name in ARRAYS)
    assert (state.num_features, state.eps, state.momentum, state.channel_axis) == (4, 1e-3, None, -1)
    assert (state.tracked is None) == ("running_mean" not in names)


def test_assignment_is_seen():
    x = batch()
    state = trained()
    state.gamma = np.full(4, 2.0, np.float32)
    other = cubn.BatchNormState.from_arrays(
        gamma=state.gamma, running_mean=state.running_mean, running_var=state.running_var
    )
    state.beta = None
    assert_same(cubn.forward(x, state), cubn.forward(x, other))
    state.gamma[:] = 3.0
    assert_same(cubn.forward(x, state), cubn.forward(x, other))
    state.eps = other.eps = 0.5
    assert_same(cubn.forward(x, state), cubn.forward(x, other))


def test_a_refused_assignment_changes_nothing():
    state = trained()
    before = state.to_dict()
    for name in ARRAYS:
        with pytest.raises(ValueError, match="shape"):
            setattr(state, name, np.ones(3, np.float32))
    with pytest.raises(TypeError, match="dtype"):
        state.gamma = np.ones(4, np.int64)
    np.testing.assert_equal(state.to_dict(), before)


# --- updates --------------------------------------------------------------------------------------------------------


def expected_after(state, x, momentum):
    stats = oracle.batch_statistics(oracle.as_ncs(x), state.eps)
    held = state.to_dict()
    old = oracle.State(held["running_mean"], held["running_var"], held["tracked"], held["skipped"])
    return oracle.update(old, stats, momentum)


def assert_updated(state, expected):
    held = state.to_dict()
    assert_same(held["running_mean"], expected.mean, "running_mean")
    assert_same(held["running_var"], expected.var, "running_var")
    assert_same(held["tracked"], expected.tracked, "tracked")
    assert_same(held["skipped"], expected.skipped, "skipped")


@pytest.mark.parametrize("how", ["forward_train", "update"])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_updates_are_those_of_the_oracle(library, momentum, how):
    pytest.importorskip(library)
    state = cubn.BatchNormState(4, momentum=momentum, like=carry(batch(), library))
    for seed in range(4):
        x = batch(seed)
        expected = expected_after(state, x, momentum)
        if how == "update":
            cubn.update(state, cubn.moments(carry(x, library)))
        else:
            cubn.forward_train(carry(x, library), state)
        assert_updated(state, expected)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_update_is_in_place(library):
    pytest.importorskip(library)
    x = carry(batch(), library)
    state = cubn.BatchNormState(4, like=x)
    mean, var = state.running_mean, state.running_var
    cubn.forward_train(x, state)
    assert state.running_mean is mean and state.running_var is var
    assert (store_of(mean) != 0).all()


def test_an_update_is_known_to_torch():
    torch = pytest.importorskip("torch")
    state = cubn.BatchNormState(4, like=torch.zeros(1))
    versions = state.running_mean._version, state.running_var._version
    cubn.update(state, cubn.moments(batch()))
    assert (state.running_mean._version, state.running_var._version) == (versions[0] + 1, versions[1] + 1)


def test_an_immutable_array_is_replaced():
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.array(batch())
    state = cubn.BatchNormState(4, like=x)
    mean, var, gamma = state.running_mean, state.running_var, state.gamma
    cubn.forward_train(x, state)
    assert_same(np.asarray(mean), np.zeros(4, np.float32), "the old mean")
    assert_same(np.asarray(var), np.ones(4, np.float32), "the old variance")
    assert state.running_mean is not mean and isinstance(state.running_mean, type(mean))
    assert state.gamma is gamma


@pytest.mark.parametrize("how", ["update=False", "frozen", "forward"])
def test_what_does_not_update(how):
    state = trained()
    before = state.to_dict()
    match how:
        case "update=False":
            cubn.forward_train(batch(), state, update=False)
        case "frozen":
            cubn.forward_frozen(batch(), state)
        case "forward":
            cubn.forward(batch(), state)
    np.testing.assert_equal(state.to_dict(), before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_guard_keeps_what_is_not_finite_out_of_the_state(momentum):
    state = trained(momentum=momentum)
    before = state.to_dict()
    x = batch(7)
    x[1, 0, 2], x[2, 3, 0] = np.inf, np.nan
    expected = expected_after(state, x, momentum)
    y, _ = cubn.forward_train(x, state)
    assert_updated(state, expected)
    np.testing.assert_array_equal(state.tracked, [4, 4, 4, 4])
    np.testing.assert_array_equal(state.skipped, [1, 0, 0, 1])
    for name in ("running_mean", "running_var"):
        kept = getattr(state, name) == before[name]
        np.testing.assert_array_equal(kept, [True, False, False, True])
    assert np.isnan(y[:, [0, 3]]).any((0, 2)).all() and np.isfinite(y[:, [1, 2]]).all()


def test_moments_of_one_value_are_skipped():
    state = trained()
    before = state.to_dict()
    cubn.update(state, cubn.moments(batch(0, (1, 4))))
    assert_same(state.running_var, before["running_var"])
    np.testing.assert_array_equal(state.skipped, [1, 1, 1, 1])


def test_running_variance_is_unbiased():
    state = cubn.BatchNormState(4, momentum=1.0)
    x = batch()
    cubn.forward_train(x, state)
    np.testing.assert_allclose(state.running_var, x.astype(np.float64).var((0, 2), ddof=1), rtol=1e-6)


# --- where an average stands, and beginning anew ----------------------------------------------------------------------

QUARTERS = np.array([[0.25], [-0.75], [1.25], [0.25]], np.float32)  # of mean 0.25


@pytest.mark.parametrize("tracked", ["int", "array", "tensor"])
def test_a_cumulative_average_goes_on(tracked):
    """999 batches of mean 10, then one of mean 0.25."""
    given = {"int": 999, "array": np.array([999])}.get(tracked)
    if given is None:
        given = pytest.importorskip("torch").tensor(999)
    held = {"running_mean": np.full(1, 10.0), "running_var": np.full(1, 4.0)}
    state = cubn.BatchNormState.from_arrays(**held, momentum=None, tracked=given)
    cubn.forward_train(QUARTERS, state)
    assert state.running_mean[0] == pytest.approx(9.99025, rel=1e-14)
    assert state.tracked.tolist() == [1000] and state.skipped.tolist() == [0]


def test_skipped_batches_have_no_weight_in_an_average_that_goes_on():
    held = {"running_mean": np.full(1, 10.0), "running_var": np.full(1, 4.0)}
    state = cubn.BatchNormState.from_arrays(**held, momentum=None, tracked=1000, skipped=1)
    cubn.forward_train(QUARTERS, state)
    assert state.running_mean[0] == pytest.approx(9.99025, rel=1e-14)


def test_a_recalibration_begins_anew():
    state = cubn.BatchNormState(1, momentum=None)
    rng = np.random.default_rng(0)
    for _ in range(200):
        cubn.forward_train(rng.standard_normal((8, 1), dtype=np.float32), state)
    state.reset()
    batches = (5 + rng.standard_normal((4, 8, 1))).astype(np.float32)
    for batch in batches:
        cubn.forward_train(batch, state)
    assert state.running_mean[0] == pytest.approx(batches.mean(), rel=1e-6) and state.running_mean[0] > 4
    assert state.tracked.tolist() == [4]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_reset_is_a_new_state(library, dtype):
    pytest.importorskip(library)
    state = cubn.BatchNormState(4, momentum=None, dtype=dtype, like=carry(batch(), library))
    new = state.copy()
    cubn.update(state, cubn.moments(batch()))
    mean, var = state.running_mean, state.running_var
    state.reset()
    assert same_states(state, new)
    assert (state.running_mean is mean and state.running_var is var) == (library != "jax")
    cubn.update(state, cubn.moments(batch(1)))
    cubn.update(new, cubn.moments(batch(1)))
    assert same_states(state, new)


def test_reset_of_one_half():
    state = trained(momentum=None)
    before, new = state.to_dict(), cubn.BatchNormState(4, momentum=None).to_dict()
    state.reset(counters=False)
    assert same_states(state, cubn.BatchNormState.from_dict(new | {n: before[n] for n in ("tracked", "skipped")}))
    state = trained(momentum=None)
    state.reset(statistics=False)
    np.testing.assert_equal(state.to_dict(), before | {name: new[name] for name in ("tracked", "skipped")})


def test_reset_is_known_to_torch():
    torch = pytest.importorskip("torch")
    state = cubn.BatchNormState(4, like=torch.zeros(1))
    version = state.running_mean._version
    state.reset()
    assert state.running_mean._version == version + 1


def test_reset_without_statistics():
    state = cubn.BatchNormState(4, track=False)
    with pytest.raises(ValueError, match="reset: state must have running statistics; got a state with track=False"):
        state.reset()


# --- options of a state -----------------------------------------------------------------------------------------------


def test_a_state_without_arrays_has_a_number_of_channels():
    state = cubn.BatchNormState.from_arrays(num_features=4)
    assert same_states(state, cubn.BatchNormState(4, affine=False, track=False))
    with pytest.raises(ValueError, match=r"gamma must have shape \(5,\)"):
        cubn.BatchNormState.from_arrays(gamma=np.ones(4), num_features=5)


@pytest.mark.parametrize("how", ["forward_train", "update"])
@pytest.mark.parametrize("variance", ["unbiased", "biased"])
def test_backends_are_told_which_variance(variance, how, monkeypatch):
    from cubn._state.holding import Holding

    seen, moving = [], Holding._moving

    @contextmanager
    def watched(*arguments):
        with moving(*arguments) as running:
            seen.append(running.update.biased)
            yield running

    monkeypatch.setattr(Holding, "_moving", watched)
    _calls.clear()
    state = cubn.BatchNormState(4, running_variance=variance)
    if how == "update":
        cubn.update(state, cubn.moments(batch()))
    else:
        cubn.forward_train(batch(), state)
    assert seen == [variance == "biased"]


@pytest.mark.parametrize("how", ["copy()", "copy", "deepcopy", "pickle", "dict"])
def test_the_running_variance_is_kept(how):
    state = trained(running_variance="biased")
    assert COPIES[how](state).running_variance == "biased"
    state.running_variance = "unbiased"
    assert COPIES[how](state).running_variance == "unbiased"


def test_what_was_pickled_before_there_was_a_choice_is_unbiased():
    written = trained().__getstate__()
    del written["running_variance"]
    state = cubn.BatchNormState.__new__(cubn.BatchNormState)
    state.__setstate__(written)
    assert same_states(state, trained())


# --- copies ---------------------------------------------------------------------------------------------------------

COPIES = {
    "copy()": lambda state: state.copy(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "dict": lambda state: cubn.BatchNormState.from_dict(state.to_dict()),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track": False, "momentum": None}, {"dtype": "float64"}])
def test_a_copy_is_equal_and_apart(how, options):
    state = trained(**options, eps=1e-3)
    twin = COPIES[how](state)
    assert same_states(twin, state)
    before = twin.to_dict()
    cubn.forward_train(batch(9), state)
    if state.gamma is not None:
        state.gamma += 1
    np.testing.assert_equal(twin.to_dict(), before)
    cubn.forward_train(batch(9), twin)
    if state.gamma is not None:
        twin.gamma += 1
    assert same_states(twin, state)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("how", ["copy()", "copy", "deepcopy", "pickle"])
def test_a_copy_stays_in_its_library(how, library):
    pytest.importorskip(library)
    state = cubn.BatchNormState(4, like=carry(batch(), library))
    cubn.update(state, cubn.moments(batch()))
    twin = COPIES[how](state)
    assert {arrays.library_of(getattr(twin, name)) for name in ARRAYS} == {library}
    assert same_states(twin, state)


def test_a_dictionary_is_plain():
    held = trained().to_dict()
    lists = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in held.items()}
    assert json.loads(json.dumps(lists)) == lists
    assert [name for name, v in held.items() if isinstance(v, np.ndarray)] == [*ARRAYS, "tracked", "skipped"]
    assert {type(held[name]) for name in ARRAYS} == {np.ndarray}


def test_a_dictionary_holds_bfloat16_exactly():
    torch = pytest.importorskip("torch")
    gamma = torch.tensor([1.0, 0.1, -3.3, 1e-3], dtype=torch.bfloat16)
    state = cubn.BatchNormState.from_arrays(gamma=gamma)
    assert_same(state.to_dict()["gamma"], gamma.float().numpy())


# --- another library's arrays ---------------------------------------------------------------------------------------


def torch_module(torch, dtype=None):
    module = torch.nn.BatchNorm1d(4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.5, 1.0, -1.0, 2.0]))
        module.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    module.weight.data = module.weight.data.to(dtype)
    module.bias.data = module.bias.data.to(dtype)
    return module


def state_of(module):
    return cubn.BatchNormState.from_arrays(
        gamma=module.weight, beta=module.bias, running_mean=module.running_mean, running_var=module.running_var
    )


def test_a_torch_module_is_trained_in_place():
    torch = pytest.importorskip("torch")
    module = torch_module(torch)
    state = state_of(module)
    reference = copy.deepcopy(module)
    x = torch.from_numpy(batch())
    y, saved = cubn.forward_train(x, state)
    torch.testing.assert_close(y, reference(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.running_mean, reference.running_mean)
    torch.testing.assert_close(module.running_var, reference.running_var)
    gradients = cubn.backward(x, saved)
    assert gradients.dgamma.dtype == torch.float32 and not gradients.dgamma.requires_grad


def test_a_module_converted_meanwhile():
    torch = pytest.importorskip("torch")
    module = torch_module(torch)
    state = state_of(module)
    x = batch()
    expected = cubn.forward(x, state)
    module.weight.data = module.weight.data.to(torch.bfloat16)
    assert_same(cubn.forward(x, state), expected)
    module.weight.data = 2 * module.weight.data
    module.bias.data = torch.zeros(4)
    state_of_twice = cubn.BatchNormState.from_arrays(
        gamma=module.weight.detach().float().numpy(),
        running_mean=module.running_mean,
        running_var=module.running_var,
    )
    assert_same(cubn.forward(x, state), cubn.forward(x, state_of_twice))


def test_a_dictionary_that_was_stored_by_numpy(tmp_path):
    state = cubn.BatchNormState(3, eps=1e-3)
    cubn.forward_train(np.random.default_rng(0).standard_normal((5, 3), dtype=np.float32), state)
    np.savez(tmp_path / "state.npz", **state.to_dict())
    again = cubn.BatchNormState.from_dict(np.load(tmp_path / "state.npz"))
    for name, value in state.to_dict().items():
        assert np.array_equal(again.to_dict()[name], value), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_parameter_gradients_are_like_the_parameters(library, dtype):
    pytest.importorskip(library)
    if library == "numpy" and dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    gamma, beta = carry(arrays.normal(np.random.default_rng(0), 4, dtype), library), np.zeros(4)
    x = batch()
    _, saved = cubn.forward_train(x, cubn.BatchNormState.from_arrays(gamma=gamma, beta=beta))
    gradients = cubn.backward(batch(1), saved)
    assert type(gradients.dx) is np.ndarray
    assert arrays.library_of(gradients.dgamma) == library
    assert gradients.dgamma.dtype == gamma.dtype and gradients.dgamma.shape == (4,)
    assert type(gradients.dbeta) is np.ndarray
    assert gradients.dbeta.dtype == np.float64 and gradients.dbeta.shape == (4,)


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_one_parameter_alone(name):
    x, dy = batch(), batch(1)
    both = cubn.BatchNormState(4)
    alone = cubn.BatchNormState.from_arrays(**{name: getattr(both, name)})
    y, saved = cubn.forward_train(x, both)
    y_alone, saved_alone = cubn.forward_train(x, alone)
    assert_same(y_alone, y)
    full, part = cubn.backward(dy, saved), cubn.backward(dy, saved_alone)
    assert_same(part.dx, full.dx)
    assert_same(getattr(part, f"d{name}"), getattr(full, f"d{name}"))
    assert getattr(part, "dbeta" if name == "gamma" else "dgamma") is None


# --- Saved ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("operation", ["forward_train", "forward_frozen"])
def test_saved_does_not_follow_the_state(operation, residual, relu):
    state = trained()
    x, dy = batch(), batch(1)
    options = {"residual": batch(2) if residual else None, "relu": relu}
    _, saved = getattr(cubn, operation)(x, state, **options)
    before = cubn.backward(dy, saved)
    cubn.forward_train(batch(3), state)
    state.gamma *= -2
    state.beta += 5
    state.eps = 1.0
    after = cubn.backward(dy, saved)
    for name, a, b in zip(before._fields, before, after, strict=True):
        absent = name == "dresidual" and not residual
        assert (a is b is None) if absent else oracle.equal(a, b), name


def test_saved_says_what_it_holds():
    x, residual = batch(0, (16, 4, 8, 16)), batch(1, (16, 4, 8, 16))
    _, saved = cubn.forward_train(x, cubn.BatchNormState(4), residual=residual, relu=True)
    stats = oracle.batch_statistics(oracle.as_ncs(x), 1e-5)
    assert saved.x is x
    assert saved.count == 16 * 8 * 16
    for name in ("mean", "var", "invstd"):
        assert_same(getattr(saved, name), getattr(stats, name), name)
    assert x.size / 8 <= len(pickle.dumps(saved.relu_bits)) < x.size / 4
    _, saved = cubn.forward_train(x, cubn.BatchNormState(4), relu=True)
    assert saved.relu_bits is None


def test_inference_tensors_have_no_version():
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        x = torch.from_numpy(batch()) + 0
        _, saved = cubn.forward_train(x, cubn.BatchNormState(4))
        assert cubn.backward(x, saved).dx.shape == x.shape


def test_gradients_share_no_memory():
    x, dy = batch(), batch(1)
    _, saved = cubn.forward_train(x, cubn.BatchNormState(4), residual=batch(2))
    plain = cubn.backward(dy.copy(), saved)
    gradients = cubn.backward(dy, saved, out=dy)
    assert gradients.dx is dy
    assert not np.shares_memory(gradients.dresidual, dy)
    assert_same(gradients.dx, plain.dx)
    assert_same(gradients.dresidual, plain.dresidual)
