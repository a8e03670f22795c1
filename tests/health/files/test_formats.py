"""Every format gives back what was written, to the bit, with what the format says of options."""

import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

import cubn
from cubn.health.files import UnreadableFile, read
from tests.health.files.making import FORMATS, LAYERS, SIZES, made, network, orbax, state_dict, tensors

ARRAYS = ("gamma", "beta", "running_mean", "running_var")
OF_FLAX = dict(eps=None, momentum=None, running_variance="biased", tracked=None)
OF_TORCH = dict(eps=None, momentum=None, running_variance="unbiased", tracked=7)
OF_CUBN = dict(eps=1e-4, momentum=0.2, running_variance="unbiased", tracked=7)
OF_GRAPH = dict(eps=1e-4, momentum=0.2, running_variance="biased", tracked=None)
OPTIONS = {
    "cubn": OF_CUBN,
    "flax": OF_FLAX,
    "orbax": OF_FLAX,
    "onnx": OF_GRAPH,
    "keras": OF_GRAPH,
}


@pytest.mark.parametrize("format", FORMATS)
def test_names_values_and_options_are_those_that_were_written(format, tmp_path):
    written = network()
    layers = {layer.name: layer for layer in read(made(format, tmp_path, written))}
    assert sorted(layers) == sorted(LAYERS)
    expected = OPTIONS.get(format.partition("_")[0], OF_TORCH)
    for name, layer in layers.items():
        assert layer.num_features == SIZES[name]
        for array in ARRAYS:
            value = getattr(layer, array)
            assert value.dtype == np.float64 and np.array_equal(value, getattr(written[name], array))
            assert layer.dtypes[array] == "float32"
        tracked = layer.tracked if expected["tracked"] is None else int(layer.tracked[-1])
        assert dict(
            eps=layer.eps, momentum=layer.momentum, running_variance=layer.running_variance, tracked=tracked
        ) == (expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_other_types_are_widened_exactly(format, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    saved = {
        name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in tensors(network()).items()
    }
    if format == "torch":
        torch.save(saved, tmp_path / "model")
    else:
        pytest.importorskip("safetensors.torch").save_file(saved, tmp_path / "model")
    for layer in read(tmp_path / "model"):
        for array, leaf in zip(ARRAYS, ("weight", "bias", "running_mean", "running_var"), strict=True):
            expected = saved[f"{layer.name}.{leaf}"].double().numpy()
            assert np.array_equal(getattr(layer, array), expected) and layer.dtypes[array] == dtype


def test_float8_is_named_and_not_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(
        {f"bn.running_{name}": torch.ones(3).to(torch.float8_e4m3fn) for name in ("mean", "var")}, tmp_path / "a"
    )
    (layer,) = read(tmp_path / "a")
    assert layer.running_var is None and layer.dtypes["running_var"] == "float8_e4m3fn" and layer.num_features == 3


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_gives_its_options(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    norms = torch.nn.Sequential(torch.nn.BatchNorm2d(4, eps=1e-3, momentum=None), torch.nn.BatchNorm1d(3, affine=False))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), norms)
    torch.save({"net": model}, tmp_path / "model", _use_new_zipfile_serialization=zipped)
    first, second = read(tmp_path / "model")
    assert (first.name, first.eps, first.momentum) == ("net.1.0", 1e-3, "cumulative")
    assert (second.name, second.eps, second.momentum, second.gamma) == ("net.1.1", 1e-5, 0.1, None)


def test_a_scripted_module_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting will go
        torch.jit.script(torch.nn.Sequential(torch.nn.BatchNorm2d(4))).save(str(tmp_path / "model"))
    assert [layer.name for layer in read(tmp_path / "model")] == ["0"]


def test_a_model_and_its_average_are_told_apart(tmp_path):
    torch = pytest.importorskip("torch")
    averaged = {f"module.{name}": tensor for name, tensor in tensors(network(seed=1)).items()}
    torch.save({"state_dict": tensors(network()), "ema": averaged}, tmp_path / "model")
    layers = {layer.name: layer for layer in read(tmp_path / "model")}
    assert {*layers} == {f"{of}.{name}" for of in ("state_dict", "ema") for name in LAYERS}
    assert np.array_equal(layers["ema.head.bn"].running_mean, network(seed=1)["head.bn"].running_mean)


class OfAUser:
    """Nothing that can be imported elsewhere."""

    best = 0.5


def test_what_else_a_checkpoint_has_is_passed_over(tmp_path):
    """States of random generators, objects of the user's, tensors of all kinds."""
    torch = pytest.importorskip("torch")
    generator = np.random.PCG64(1).state
    generator["state"]["state"] = (1 << 128) - 1  # with a byte for the sign
    saved = {
        "state_dict": {f"model.{name}": tensor for name, tensor in tensors(network()).items()},
        "hyper_parameters": {"user": OfAUser(), "path": Path("/a"), "dtype": torch.float32, "running_mean": OfAUser()},
        "random": [generator, random.getstate(), np.random.RandomState(0).get_state(), torch.get_rng_state()],
        "arrays": [np.arange(3.0), np.float64(3), {1, 2}, frozenset([3]), slice(1, 2), 1j, bytearray(b"a")],
        "tensors": [
            torch.ones(2, dtype=torch.complex64).conj(),
            torch.ones(2).to(torch.float8_e4m3fn),
            torch.eye(3).to_sparse(),
            torch.empty(3, device="meta"),
            torch.nn.Parameter(torch.ones(2)),
            torch.zeros(2).untyped_storage(),
        ],
    }
    torch.save(saved, tmp_path / "a.ckpt")
    assert [layer.name for layer in read(tmp_path / "a.ckpt")] == [f"model.{name}" for name in LAYERS]


@pytest.mark.parametrize("of", ["torch", "numpy"])
def test_statistics_in_a_pickle_that_are_no_tensors_are_not_called_absent(of, tmp_path):
    """By pickle.dump, which torch's and NumPy's arrays answer with calls of their own."""
    entries = tensors(network()) if of == "torch" else state_dict(network())
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(entries, protocol=2))
    with pytest.raises(UnreadableFile, match=r"statistics are pickled as (objects|numpy\S+), which is not read; save"):
        read(tmp_path / "a.pkl")


def test_a_view_of_a_larger_storage_is_read_with_its_strides(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0)
    saved = {
        "bn.running_mean": base[3:13:2],
        "bn.running_var": torch.ones(1).expand(5),
        "bn.weight": base.view(6, 4)[1:, 2],
    }
    torch.save(saved, tmp_path / "model")
    (layer,) = read(tmp_path / "model")
    assert np.array_equal(layer.running_mean, [3, 5, 7, 9, 11])
    assert np.array_equal(layer.running_var, np.ones(5)) and np.array_equal(layer.gamma, base.view(6, 4)[1:, 2])


def test_one_state_has_the_name_of_its_file(tmp_path):
    np.savez(tmp_path / "first.npz", **cubn.BatchNormState(4, momentum=None).to_dict())
    (layer,) = read(tmp_path / "first.npz")
    assert (layer.name, layer.momentum) == ("first", "cumulative")


def test_what_is_no_vector_is_no_batch_norm(tmp_path):
    np.savez(tmp_path / "a.npz", **{"norm.running_mean": np.ones(()), "norm.running_var": np.ones(())})
    assert read(tmp_path / "a.npz") == []


def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path):
    entries = state_dict(network()) | {"head.bn.running_var": np.ones(7, np.float32)}
    np.savez(tmp_path / "a.npz", **entries)
    with pytest.raises(UnreadableFile, match=r"head\.bn"):
        read(tmp_path / "a.npz")


def test_big_endian_arrays_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"bn.running_{name}": np.array([1, 2], ">f4") for name in ("mean", "var")})
    assert np.array_equal(read(tmp_path / "a.npz")[0].running_var, [1, 2])


def test_pickled_arrays_in_npz_stay_unread(tmp_path):
    objects = np.array([{}, None], object)
    np.savez(tmp_path / "a.npz", **state_dict(network()), objects=objects)
    assert len(read(tmp_path / "a.npz")) == len(LAYERS)


def test_names_have_nothing_that_a_terminal_obeys(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"\x1b[2J.running_{name}": np.ones(2) for name in ("mean", "var")})
    assert read(tmp_path / "a.npz")[0].name == "?[2J"


@pytest.mark.parametrize("package", ["h5py", "tensorstore"])
def test_a_missing_package_is_named_with_a_command(package, tmp_path, monkeypatch):
    path = made("keras_h5" if package == "h5py" else "orbax", tmp_path, network())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnreadableFile, match=rf"needs {package}\. .*pip install {package}"):
        read(path)


def test_steps_beside_each_other_are_not_chosen_from(tmp_path):
    made("orbax", tmp_path / "run", network())
    orbax(tmp_path / "other", network())
    (tmp_path / "other" / "5").rename(tmp_path / "run" / "6")
    with pytest.raises(UnreadableFile, match=r"several checkpoints .*5/default, 6/default"):
        read(tmp_path / "run")
    assert len(read(tmp_path / "run" / "6")) == len(LAYERS)


@pytest.mark.full
def test_what_flax_and_orbax_write_themselves(tmp_path):
    nn = pytest.importorskip("flax.linen", reason="flax is not installed: its files are written by hand elsewhere")
    checkpoint = pytest.importorskip("orbax.checkpoint")
    jax = pytest.importorskip("jax")
    from flax.serialization import to_bytes

    variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), jax.numpy.ones((2, 3)))
    (tmp_path / "a.msgpack").write_bytes(to_bytes(variables))
    with checkpoint.StandardCheckpointer() as writer:
        writer.save(tmp_path / "orbax", variables)
    for name in ("a.msgpack", "orbax"):
        assert [layer.num_features for layer in read(tmp_path / name)] == [3]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Keras, about NumPy
def test_what_keras_writes_itself(tmp_path):
    keras = pytest.importorskip("keras", reason="Keras is not installed: its files are written by hand elsewhere")
    norms = [
        keras.layers.BatchNormalization(name="first"),
        keras.layers.BatchNormalization(center=False, name="second"),
    ]
    model = keras.Sequential([keras.Input((3,)), *norms])
    for name in ("model.keras", "model.h5"):
        model.save(tmp_path / name)
        layers = {layer.name: layer for layer in read(tmp_path / name)}
        assert {*layers} == {"first", "second"} and layers["second"].beta is None
        assert layers["first"].momentum == 0.01
