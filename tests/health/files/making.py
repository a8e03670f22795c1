"""Checkpoints of one small network in every format, written by the formats' own libraries where they are small."""

import json
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

import cubn

C = 5
LAYERS = ("body.bn0", "body.bn1", "head.bn")
SIZES = {"body.bn0": C, "body.bn1": 3, "head.bn": 8}
NEGATIVE = ("body.bn1", 2)
"""Layer and channel of a variance that is negative."""
NOT_FINITE = ("head.bn", 0)
"""Layer and channel of a mean that is a NaN."""


def network(*, faults=False, seed=0):
    """Arrays of every layer by cubn's names, in float32."""
    random = np.random.default_rng(seed)
    made = {
        name: SimpleNamespace(
            gamma=random.uniform(0.5, 1.5, size).astype(np.float32),
            beta=random.standard_normal(size).astype(np.float32),
            running_mean=random.standard_normal(size).astype(np.float32),
            running_var=random.uniform(0.5, 2, size).astype(np.float32),
        )
        for name, size in SIZES.items()
    }
    if faults:
        made[NEGATIVE[0]].running_var[NEGATIVE[1]] = -1
        made[NOT_FINITE[0]].running_mean[NOT_FINITE[1]] = np.nan
    return made


TORCH = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
FLAX = {"scale": "gamma", "bias": "beta", "mean": "running_mean", "var": "running_var"}
KERAS = {"gamma": "gamma", "beta": "beta", "moving_mean": "running_mean", "moving_variance": "running_var"}


def state_dict(layers):
    """As torch names them, with counters, among the tensors of other layers."""
    found = {"body.conv.weight": np.ones((4, 3, 3, 3), np.float32), "body.conv.bias": np.ones(4, np.float32)}
    for name, arrays in layers.items():
        found |= {f"{name}.{leaf}": getattr(arrays, role) for leaf, role in TORCH.items()}
        found[f"{name}.num_batches_tracked"] = np.array(7)
    return found


def tensors(layers):
    torch = pytest.importorskip("torch")
    return {name: torch.tensor(array) for name, array in state_dict(layers).items()}


def torch_zip(folder, layers):
    torch = pytest.importorskip("torch")
    torch.save(tensors(layers), folder / "model.pth")
    return folder / "model.pth"


def torch_pickles(folder, layers):
    torch = pytest.importorskip("torch")
    torch.save(tensors(layers), folder / "model.bin", _use_new_zipfile_serialization=False)
    return folder / "model.bin"


def torch_checkpoint(folder, layers):
    """Of a data-parallel model, with an optimiser's state beside it."""
    torch = pytest.importorskip("torch")
    model = {f"module.{name}": tensor for name, tensor in tensors(layers).items()}
    momenta = {i: {"exp_avg": tensor.float().clone()} for i, tensor in enumerate(model.values())}
    optimizer = {"state": momenta, "param_groups": [{"lr": 0.1, "params": [*momenta], "eps": 1e-8}]}
    torch.save({"epoch": 3, "model": model, "optimizer": optimizer}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def safetensors(folder, layers):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file(state_dict(layers), folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def safetensors_shards(folder, layers):
    numpy = pytest.importorskip("safetensors.numpy")
    entries = state_dict(layers)
    files = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(entries)}
    for file in set(files.values()):
        numpy.save_file({name: entries[name] for name in entries if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder / "model.safetensors.index.json"


def npz(folder, layers):
    np.savez(folder / "model.npz", **state_dict(layers))
    return folder / "model.npz"


def npz_compressed(folder, layers):
    np.savez_compressed(folder / "packed.npz", **state_dict(layers))
    return folder / "packed.npz"


def states(layers):
    made = {}
    for name, arrays in layers.items():
        made[name] = cubn.BatchNormState.from_arrays(**vars(arrays), eps=1e-4, momentum=0.2, check=False)
        made[name].tracked = 7
    return made


def cubn_npz(folder, layers):
    entries = {
        f"{name}/{key}": value for name, state in states(layers).items() for key, value in state.to_dict().items()
    }
    np.savez(folder / "states.npz", **entries)
    return folder / "states.npz"


def cubn_torch(folder, layers):
    torch = pytest.importorskip("torch")
    like = torch.ones(1)
    torch.save({name: state.to_dict(like=like) for name, state in states(layers).items()}, folder / "states.pt")
    return folder / "states.pt"


def flax_tree(layers):
    """Nested as Flax nests variables, names with dots taken apart."""
    tree = {"params": {}, "batch_stats": {}}
    for name, arrays in layers.items():
        for leaf, role in FLAX.items():
            node = tree["params" if leaf in ("scale", "bias") else "batch_stats"]
            for part in name.split("."):
                node = node.setdefault(part, {})
            node[leaf] = getattr(arrays, role)
    return {"step": 3, "opt_state": {"0": {"count": 3}}, **tree}


def flax(folder, layers):
    """As `flax.serialization.to_bytes` does."""
    msgpack = pytest.importorskip("msgpack")

    def packed(node):
        if isinstance(node, dict):
            return {key: packed(value) for key, value in node.items()}
        if isinstance(node, np.ndarray):
            return msgpack.ExtType(1, msgpack.packb((node.shape, node.dtype.name, node.tobytes())))
        return node

    (folder / "model.msgpack").write_bytes(msgpack.packb(packed(flax_tree(layers))))
    return folder / "model.msgpack"


def onnx_model(layers):
    onnx = pytest.importorskip("onnx")
    helper, nodes, initializers, x = onnx.helper, [], [], "x"
    for name, arrays in layers.items():
        entries = {f"{name}.{leaf}": getattr(arrays, role) for leaf, role in TORCH.items()}
        initializers += [onnx.numpy_helper.from_array(array, key) for key, array in entries.items()]
        nodes.append(helper.make_node("BatchNormalization", [x, *entries], [name], epsilon=1e-4, momentum=0.8))
        x = name
    ends = [helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None) for end in ("x", x)]
    return onnx, helper.make_model(helper.make_graph(nodes, "graph", ends[:1], ends[1:], initializers))


def onnx_file(folder, layers):
    onnx, model = onnx_model(layers)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def onnx_external(folder, layers):
    onnx, model = onnx_model(layers)
    options = dict(save_as_external_data=True, location="weights", size_threshold=0)
    onnx.save(model, folder / "outside.onnx", **options)
    return folder / "outside.onnx"


def keras_config(layers):
    options = {"momentum": 0.8, "epsilon": 1e-4, "center": True, "scale": True}
    made = [{"class_name": "BatchNormalization", "config": {"name": name, **options}} for name in layers]
    return json.dumps({"class_name": "Functional", "config": {"name": "model", "layers": made}})


def keras_h5(folder, layers, name="model.h5"):
    """The layout of a whole model in HDF5."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / name, "w") as file:
        file.attrs["model_config"] = keras_config(layers)
        for layer, arrays in layers.items():
            for leaf, role in KERAS.items():
                file[f"model_weights/{layer}/model/{layer}/{leaf}:0"] = getattr(arrays, role)
    return folder / name


def keras_zip(folder, layers):
    """The layout of Keras 3: variables by number, names as attributes."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "weights", "w") as file:
        for i, (layer, arrays) in enumerate(layers.items()):
            group = file.create_group(f"layers/batch_normalization{f'_{i}' if i else ''}/vars")
            group.attrs["name"] = layer
            for number, role in enumerate(KERAS.values()):
                group[str(number)] = getattr(arrays, role)
    with zipfile.ZipFile(folder / "model.keras", "w") as file:
        file.writestr("metadata.json", "{}")
        file.writestr("config.json", keras_config(layers))
        file.write(folder / "weights", "model.weights.h5")
    return folder / "model.keras"


def orbax(folder, layers, driver="ocdbt"):
    """The layout of Orbax: a zarr array for each leaf, by its dotted name."""
    tensorstore = pytest.importorskip("tensorstore")
    root = folder / "5" / "default"
    root.mkdir(parents=True)
    (root / "_METADATA").write_text("{}")
    store = (
        {"driver": "ocdbt", "base": f"file://{root}/"} if driver == "ocdbt" else {"driver": "file", "path": f"{root}/"}
    )
    for collection in ("params", "batch_stats"):
        for name, arrays in layers.items():
            for leaf, role in FLAX.items():
                if (leaf in ("scale", "bias")) == (collection == "params"):
                    array = getattr(arrays, role)
                    place = store | {"path": f"{store.get('path', '')}{collection}.{name}.{leaf}/"}
                    spec = {"driver": "zarr", "kvstore": place}
                    tensorstore.open(spec, create=True, dtype=array.dtype.name, shape=array.shape).result().write(
                        array
                    ).result()
    return folder


def orbax_files(folder, layers):
    return orbax(folder, layers, "file")


IN_PROCESS = {
    make.__name__: make
    for make in (
        torch_zip,
        torch_pickles,
        torch_checkpoint,
        safetensors,
        safetensors_shards,
        npz,
        npz_compressed,
        cubn_npz,
        cubn_torch,
        flax,
        onnx_file,
        onnx_external,
    )
}
"""Formats that cubn reads by itself."""
BY_PACKAGES = {make.__name__: make for make in (keras_h5, keras_zip, orbax, orbax_files)}
"""Formats that packages read, in a process of their own."""
FORMATS = IN_PROCESS | BY_PACKAGES


def made(format, folder, layers):
    """The path of a checkpoint in this format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say about themselves
        return FORMATS[format](folder, layers)
