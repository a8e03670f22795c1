"""Which tensors of a file are batch norms, told by their names, and these alone read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from cubn._types import FLOATS
from cubn.health.files.tensors import Entry, Tensor, Unread, Value
from cubn.health.files.unreadable import UnreadableFile
from cubn.health.layer import Counts, Float64, Layer
from cubn.typing import RunningVariance

MOST_VALUES = 1 << 24
"""Of all batch norms of a file together; the widest networks have a hundredth of it."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What data-parallel, averaged and compiled models put before the names of all their tensors."""

Group = dict[str, Value]
Arrays = dict[str, Tensor | None]


class Names(NamedTuple):
    """What a library calls the arrays of a batch norm, and the variance it keeps."""

    running_mean: str
    running_var: str
    gamma: str
    beta: str
    tracked: str = ""
    skipped: str = ""
    running_variance: RunningVariance | None = None


OF_TORCH = Names("running_mean", "running_var", "weight", "bias", "num_batches_tracked", "", "unbiased")
OF_CUBN = Names("running_mean", "running_var", "gamma", "beta", "tracked", "skipped")
OF_KERAS = Names("moving_mean", "moving_variance", "gamma", "beta", running_variance="biased")
OF_FLAX = Names("mean", "var", "scale", "bias", running_variance="biased")


def layers(entries: Iterable[Entry], whole: str) -> list[Layer]:
    """The batch norms among the entries; `whole` names one that has no name, because it is all there is."""
    groups = _groups(entries)
    named = {key: names for key, group in groups.items() if (names := _names(key, group))}
    found = {key: names for key, names in named.items() if any(isinstance(x, Tensor) for x in groups[key].values())}
    left = MOST_VALUES
    made = []
    for (collection, name), label in zip(found, _labels(list(found), whole), strict=True):
        arrays, group = _arrays((collection, name), found[collection, name], groups), groups[collection, name]
        left -= sum(math.prod(tensor.shape) for tensor in arrays.values() if tensor is not None)
        if left < 0:
            raise UnreadableFile(f"its batch norms have more than {MOST_VALUES} values in all, as no network's have")
        layer = _layer(label, arrays, group, found[collection, name].running_variance)
        if layer is not None:
            made.append(layer)
    if not made:
        _check_unread(value for key in named for value in groups[key].values())
    return made


def _check_unread(values: Iterable[Value]) -> None:
    """That there are no batch norms is not said of a file whose running statistics are only of another kind."""
    for value in values:
        if isinstance(value, Unread):
            how = "save tensors, by torch.save(model.state_dict(), path)"
            raise UnreadableFile(f"its running statistics are pickled as {value.kind[:80]}, which is not read; {how}")


Key = tuple[str, str]
"""Collection and name of a layer."""


def _groups(entries: Iterable[Entry]) -> dict[Key, Group]:
    """What stands under one name but for its last part."""
    groups: dict[Key, Group] = {}
    for entry in entries:
        name = entry.name.replace("/", ".").removesuffix(":0").removesuffix(".value")
        layer, _, leaf = name.rpartition(".")
        groups.setdefault((entry.collection, layer), {})[leaf] = entry.value
    return groups


def _names(key: Key, group: Group) -> Names | None:
    """By whose names this is a batch norm, if it is one."""
    if "running_mean" in group or "running_var" in group:
        return OF_CUBN if "gamma" in group or "channel_axis" in group else OF_TORCH
    if "moving_mean" in group or "moving_variance" in group:
        return OF_KERAS
    parts = key[1].split(".")
    if "mean" in group and "var" in group and ("batch_stats" in parts or "scale" in group or "bias" in group):
        return OF_FLAX
    return None


def _arrays(key: Key, names: Names, groups: dict[Key, Group]) -> Arrays:
    """The tensors of a batch norm by cubn's names."""
    group = groups[key]
    if names is OF_FLAX:
        collection, name = key
        parts = [name.replace("batch_stats", "params", 1), name.replace("batch_stats", "params.params", 1)]
        for part in parts:
            group = groups.get((collection, part), {}) | group
    return {
        role: value if isinstance(value := group.get(name), Tensor) else None
        for role, name in names._asdict().items()
        if role != "running_variance"
    }


def _labels(keys: list[Key], whole: str) -> Iterator[str]:
    """Names of layers, without what all begin with, and with their collections' where there are several."""
    flax = [_without_batch_stats(key) for key in keys]
    collections = {collection for collection, _ in flax}
    inner = {collection: _unwrapped([name for of, name in flax if of == collection]) for collection in collections}
    for collection, _ in flax:
        name = inner[collection].pop(0)
        several = [collection] if len(collections) > 1 and collection else []
        label = ".".join([*several, *([name] if name else [])]) or whole
        yield "".join(sign if sign.isprintable() else "?" for sign in label)  # nothing that a terminal would obey


def _without_batch_stats(key: Key) -> Key:
    collection, name = key
    before, found, after = f".{name}.".partition(".batch_stats.")
    return (f"{collection}{before}".strip("."), after.strip(".")) if found else key


def _unwrapped(names: list[str]) -> list[str]:
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in names)), None):
        names = [name.removeprefix(wrapper) for name in names]
    return names


def _layer(name: str, arrays: Arrays, group: Group, running_variance: RunningVariance | None) -> Layer | None:
    """A layer of these tensors; None if they are no batch norm's after all: not a vector for each statistic."""
    statistics = [tensor for role in ("running_mean", "running_var") if (tensor := arrays[role]) is not None]
    if not statistics or any(len(tensor.shape) != 1 for tensor in statistics):
        return None
    (C,) = statistics[0].shape
    given = {role: tensor for role, tensor in arrays.items() if tensor is not None}
    vectors = {role: tensor for role, tensor in given.items() if role not in ("tracked", "skipped")}
    for role, tensor in vectors.items():
        if tensor.shape != (C,):
            raise UnreadableFile(
                f"{role} of {name[:80]} has shape {tensor.shape} where its statistics have {C} channels"
            )
    widened: dict[str, Any] = {role: _widened(tensor) for role, tensor in vectors.items()}
    known: dict[str, Any] = {"running_variance": running_variance} | _options(group)
    counts: dict[str, Any] = {role: _counts(given[role], C) for role in ("tracked", "skipped") if role in given}
    dtypes = {role: tensor.dtype for role, tensor in vectors.items()}
    return Layer(name, C, **widened, dtypes=dtypes, **known, **counts)


@np.errstate(invalid="ignore")  # NumPy warns of signalling NaNs
def _widened(tensor: Tensor) -> Float64 | None:
    return tensor.array().astype(np.float64) if tensor.dtype in FLOATS else None


def _counts(tensor: Tensor, C: int) -> Counts | None:
    """One count for all channels, or each channel's own."""
    if "int" not in tensor.dtype or tensor.shape not in ((), (1,), (C,)):
        return None
    return np.broadcast_to(tensor.array().astype(np.int64), (C,)).copy()


def _options(group: Group) -> dict[str, Any]:
    """Those that the file says."""
    options: dict[str, Any] = {}
    eps, momentum, variance = (_plain(group.get(name)) for name in ("eps", "momentum", "running_variance"))
    if isinstance(eps, int | float):
        options["eps"] = float(eps)
    if isinstance(momentum, int | float):
        options["momentum"] = float(momentum)
    elif group.get("momentum", ...) is None or ("channel_axis" in group and "momentum" not in group):
        cumulative: Literal["cumulative"] = "cumulative"
        options["momentum"] = cumulative
    if variance in ("biased", "unbiased"):
        options["running_variance"] = variance
    return options


def _plain(value: Value) -> float | int | str | None:
    """An option as a number or a word, which may have been stored as a tensor."""
    if isinstance(value, Tensor):
        known = value.size == 1 and value.dtype in (*FLOATS, "int64", "int32")
        return value.array().item() if known else None
    return None if isinstance(value, Unread) else value
