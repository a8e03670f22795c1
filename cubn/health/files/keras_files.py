"""Keras: weights in HDF5, alone or in a zip file with the model's configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cubn.health.files import child
from cubn.health.files.archive import STORED, Archive
from cubn.health.files.source import Source
from cubn.health.files.tensors import Entry, Tensor, Value
from cubn.health.files.text import parsed
from cubn.health.files.unreadable import UnreadableFile

WEIGHTS = "model.weights.h5"
MOST_OF_CONFIG = 1 << 25

_BY_CLASS = re.compile(r"(sync_)?batch_normalization(_\d+)?")
_ROLES = {"gamma": "gamma", "beta": "beta", "moving_mean": "running_mean", "moving_variance": "running_var"}
_IN_ORDER = tuple(_ROLES.values())

Config = Mapping[str, Any]


def of_zip(archive: Archive) -> Iterator[Entry]:
    """Of a .keras file."""
    member, config = archive.members[WEIGHTS], archive.members["config.json"]
    if member.method != STORED or config.size > MOST_OF_CONFIG:
        raise UnreadableFile("its weights are packed, which Keras does not do; unzip it and read model.weights.h5")
    archive.source.check(archive.offset(member), member.size)
    configs = _configs(parsed(archive.checked(config)))
    return _entries(*child.run("h5py", archive.source.path, archive.offset(member), member.size), configs)


def of_h5(source: Source) -> Iterator[Entry]:
    """Of weights or a model in HDF5."""
    about, tensors = child.run("h5py", source.path, 0, source.size)
    configs = _configs(parsed(about["config"].encode())) if about["config"] else {}
    return _entries(about, tensors, configs)


def _configs(root: Any) -> dict[str, Config]:
    """The configurations of batch norms, by the layers' names."""
    found, waiting = {}, [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            match node:
                case {"class_name": str(kind), "config": {"name": str(name)} as config}:
                    if kind.endswith("BatchNormalization"):
                        found[name] = config
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return found


def _entries(about: Mapping[str, Any], tensors: dict[str, Tensor], configs: dict[str, Config]) -> Iterator[Entry]:
    """Batch norms by cubn's names; layers of one name in two models by their whole path."""
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        group, _, leaf = path.rpartition("/")
        groups.setdefault(group, {})[leaf] = tensor
    names = {group: about["names"].get(group) or _name(group) for group in groups}
    seen = Counter(names.values())
    for group, given in groups.items():
        config = configs.get(names[group])
        arrays = _numbered(group, given, config) if group.endswith("/vars") else _named(given)
        if "running_mean" not in arrays and "running_var" not in arrays:
            continue
        values: dict[str, Value] = {**arrays, "running_variance": "biased", **_options(config)}
        for role, value in values.items():
            yield Entry("", f"{names[group] if seen[names[group]] == 1 else group}.{role}", value)


def _name(group: str) -> str:
    return group.removesuffix("/vars").rpartition("/")[2]


def _named(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {leaf.removesuffix(":0"): tensor for leaf, tensor in given.items()}
    return {role: plain[leaf] for leaf, role in _ROLES.items() if leaf in plain}


def _numbered(group: str, given: Mapping[str, Tensor], config: Config | None) -> dict[str, Tensor]:
    """Keras 3 numbers the variables of a layer; without gamma or beta, the others have lower numbers."""
    if config is None and not _BY_CLASS.fullmatch(_name(group)):
        return {}
    roles = list(_IN_ORDER)
    if config is not None:
        options = ("scale", "center", "axis", "axis")
        roles = [role for role, option in zip(roles, options, strict=True) if config.get(option) is not False]
    elif len(given) < len(roles):  # without gamma, beta or both: which, the file does not say
        roles = ["", "", *roles[2:]][-len(given) :]
    return {role: given[str(i)] for i, role in enumerate(roles) if role and str(i) in given}


def _options(config: Config | None) -> dict[str, Value]:
    """eps, and the momentum as the weight of the new value."""
    if config is None:
        return {}
    eps, momentum = config.get("epsilon"), config.get("momentum")
    known: dict[str, Value] = {}
    if isinstance(eps, int | float):
        known["eps"] = eps
    if isinstance(momentum, int | float):
        known["momentum"] = round(1 - momentum, 9)
    return known
