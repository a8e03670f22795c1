"""What users have, as layers: states, models, state_dicts, trees of variables, what was stored of them."""

import io
import json

import numpy as np
import pytest

import cubn
from cubn.health.layer import Layer, layers_of

C = 5


def trained(**options):
    state = cubn.BatchNormState(C, **options)
    rng = np.random.default_rng(0)
    if state.running_mean is not None:
        cubn.update(state, cubn.moments(rng.standard_normal((10, C), np.float32)))
    return state


def check(layer, state, name, **expected):
    assert (layer.name, layer.num_features) == (name, C)
    for key in ("gamma", "beta", "running_mean", "running_var", "tracked", "skipped"):
        held = expected.get(key, getattr(state, key))
        assert (getattr(layer, key) is None) == (held is None)
        if held is not None:
            np.testing.assert_array_equal(getattr(layer, key), np.asarray(held))
            assert getattr(layer, key).dtype == ("int64" if key in ("tracked", "skipped") else "float64")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_state_and_what_was_stored_of_it(affine, track, momentum):
    state = trained(affine=affine, track=track, momentum=momentum, eps=1e-3, running_variance="biased")
    file = io.BytesIO()
    np.savez(file, **state.to_dict())
    file.seek(0)
    lists = json.loads(json.dumps(state.to_dict(), default=np.ndarray.tolist))
    for subject in (state, state.to_dict(), np.load(file), lists):
        (layer,) = layers_of(subject)
        check(layer, state, "state")
        assert (layer.eps, layer.momentum) == (1e-3, 0.1 if momentum else "cumulative")
        assert layer.running_variance == "biased"


def test_arrays_are_copies():
    state = trained()
    (layer,) = layers_of(state)
    state.running_mean[:] = 7
    assert (layer.running_mean != 7).all()


def test_names_are_those_of_lists_and_mappings_nested_as_they_are():
    state = trained()
    subject = {"a": state, "b": {"c": [state, state.to_dict()]}, "d": {"running_mean": np.zeros(2)}}
    subject["d"]["running_var"] = np.ones(2)
    assert [layer.name for layer in layers_of(subject)] == ["a", "b.c.0", "b.c.1", "d"]
    assert [layer.name for layer in layers_of([state, [state]])] == ["0", "1.0"]
    assert layers_of([]) == layers_of({}) == []


def test_a_layer_is_one_already():
    layer = Layer("x", 3)
    assert layers_of(layer) == layers_of([layer]) == [layer]
    assert [each.name for each in layers_of({"y": layer})] == ["y"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_how_arrays_are_stored_is_kept(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    (layer,) = layers_of({"bn.running_mean": np.full(3, 0.5, kind), "bn.running_var": np.ones(3, kind)})
    assert layer.dtypes == {"running_mean": dtype, "running_var": dtype}
    assert layer.running_mean.tolist() == [0.5] * 3


# --- PyTorch --------------------------------------------------------------------------------------------------------


def network(torch):
    nn = torch.nn
    model = nn.Sequential(
        nn.BatchNorm1d(C),
        nn.ModuleDict({"inner": nn.BatchNorm1d(C, eps=1e-3, momentum=None, affine=False), "other": nn.LayerNorm(C)}),
        nn.BatchNorm1d(C, track_running_stats=False),
        nn.InstanceNorm1d(C, track_running_stats=True),
        nn.LazyBatchNorm1d(),
    )
    with torch.no_grad():
        model[0](torch.randn(8, C))
        model[1]["inner"](torch.randn(8, C))
    return model


def test_the_batch_norms_of_a_model():
    torch = pytest.importorskip("torch")
    model = network(torch)
    first, inner, untracked = layers_of(model)
    check(first, cubn.BatchNormState.from_module(model[0]), "0", skipped=None, gamma=np.ones(C), beta=np.zeros(C))
    assert (first.eps, first.momentum, first.running_variance) == (1e-5, 0.1, "unbiased")
    assert (inner.name, inner.eps, inner.momentum, inner.gamma) == ("1.inner", 1e-3, "cumulative", None)
    assert (untracked.name, untracked.running_mean, untracked.tracked) == ("2", None, None)
    assert [layer.name for layer in layers_of({"net": model, "more": [model[0]]})] == [
        *("net.0", "net.1.inner", "net.2"),
        "more.0",
    ]


def test_cubns_own_modules_and_those_of_others():
    torch = pytest.importorskip("torch")
    import cubn.torch

    bn = cubn.torch.BatchNorm1d(C)
    x = torch.randn(8, C)
    x[0, 2] = torch.inf
    bn(x)
    (layer,) = layers_of(bn)
    assert layer.skipped.tolist() == [0, 0, 1, 0, 0]

    class Frozen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(C))

    (layer,) = layers_of(torch.nn.ModuleDict({"frozen": Frozen()}))
    assert (layer.name, layer.momentum, layer.eps, layer.tracked) == ("frozen", None, None, None)


def test_a_state_dict_as_it_is_or_in_a_checkpoint():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(C, C), torch.nn.BatchNorm1d(C), torch.nn.LayerNorm(C)).half()
    whole = model.state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.ones(C)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    for subject, name in (
        (whole, "1"),
        ({"epoch": 3, "state_dict": whole, "optimizer": optimizer}, "state_dict.1"),
        (model[1].state_dict(), "state"),
    ):
        (layer,) = layers_of(subject)
        assert (layer.name, layer.num_features, layer.eps, layer.momentum) == (name, C, None, None)
        assert set(layer.dtypes.values()) == {"float16"}
        assert layer.tracked.tolist() == [0] * C


# --- Flax -----------------------------------------------------------------------------------------------------------


def test_the_variables_of_flax():
    jax = pytest.importorskip("jax")
    array = jax.numpy.arange(1.0, 1 + C)
    variables = {
        "params": {"block": {"bn": {"scale": array, "bias": array}, "dense": {"bias": array, "kernel": array[None]}}},
        "batch_stats": {"block": {"bn": {"mean": array, "var": 2 * array}}},
    }
    (layer,) = layers_of(variables)
    assert (layer.name, layer.running_variance, layer.momentum) == ("block.bn", "biased", None)
    np.testing.assert_array_equal(layer.running_var, 2 * np.arange(1.0, 1 + C))
    np.testing.assert_array_equal(layer.gamma, layer.beta)


def test_a_module_of_flax():
    nnx = pytest.importorskip("flax.nnx")
    bn = nnx.BatchNorm(C, momentum=0.9, epsilon=1e-3, rngs=nnx.Rngs(0))
    (layer,) = layers_of(nnx.Sequential(bn))
    assert layer.momentum == pytest.approx(0.1) and layer.eps == 1e-3 and layer.running_variance == "biased"
    assert layer.running_var.tolist() == [1] * C and layer.gamma.tolist() == [1] * C


# --- what is none ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [3, None, "model.pth", np.ones(3), object()])
def test_what_is_no_batch_norm_is_a_type_error(subject):
    for given in (subject, [subject]):
        with pytest.raises(TypeError, match=r"^diagnose: subject must be a BatchNormState, a model of .*; got an? "):
            cubn.diagnose(given)


def test_arrays_that_do_not_fit_are_an_error_that_names_the_layer():
    arrays = {"bn.running_mean": np.zeros(3), "bn.running_var": np.ones(4)}
    with pytest.raises(ValueError, match=r"^diagnose: bn: running_mean must have shape \(4,\).*shape=\(3,\)"):
        cubn.diagnose(arrays)
    arrays |= {"bn.running_var": np.ones(3), "bn.num_batches_tracked": np.ones(2, int)}
    with pytest.raises(ValueError, match=r"bn: tracked must have shape \(3,\)"):
        cubn.diagnose(arrays)
    arrays["bn.running_var"] = np.ones(3, complex)
    with pytest.raises(TypeError, match="bn: running_var"):
        cubn.diagnose(arrays)


def test_moments_must_be_those_of_a_layer():
    state, three, five = trained(), cubn.moments(np.ones((2, 3))), cubn.moments(np.ones((2, C)))
    for moments, error, words in (
        (3, TypeError, "moments must be Moments, or a mapping of names to Moments; got an int"),
        ({"state": 3}, TypeError, r"moments\['state'\] must be Moments; got an int"),
        ({"bn": five}, ValueError, "moments must be by the names of batch norms, as 'state'; got 'bn'"),
        (three, ValueError, r"moments\['state'\] must have 5 channels, as the layer has; got 3"),
    ):
        with pytest.raises(error, match=f"^diagnose: {words}"):
            cubn.diagnose(state, moments)
    with pytest.raises(ValueError, match="moments must be a mapping of names to Moments, for the subject has 2"):
        cubn.diagnose([state, state], five)
    layers = cubn.diagnose({"a": state, "b": state}, {"b": five}).layers
    assert [layer.moments for layer in layers] == [None, five]
