"""The same layers on several ranks: which of them differ, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cubn._state.arrays import ARRAYS
from cubn._state.counted import COUNTERS
from cubn.health.layer import Layer
from cubn.sync import Comm, communicator
from cubn.sync.messages import exchanged

_PLAIN = ("name", "num_features", "dtypes", "eps", "momentum", "running_variance")


def compared(make: Callable[[], Sequence[Layer]], comm: Comm) -> list[Layer]:
    """Layers, with what other ranks hold in their place where that differs.

    A digest travels first; where all are the same, nothing else does. An error of `make` is one of all ranks.
    """
    layers: list[Layer] = []

    def digest() -> bytes:
        layers.extend(make())
        return hashlib.blake2b(_written(layers)).digest()

    if len(set(exchanged(comm, "diagnose", digest))) == 1:
        return layers
    said = exchanged(comm, "diagnose", lambda: _written(layers))
    return _beside(layers, [_read(each) for each in said], communicator(comm).rank)


def _beside(layers: Sequence[Layer], ranks: Sequence[dict[str, Layer]], own: int) -> list[Layer]:
    """Each layer with those of other ranks that differ; and layers that only others have."""
    mine = {layer.name: _written([layer]) for layer in layers}

    def others(name: str) -> dict[int, Layer | None]:
        found = {rank: each.get(name) for rank, each in enumerate(ranks) if rank != own}
        return {rank: layer for rank, layer in found.items() if layer is None or _written([layer]) != mine.get(name)}

    here = [replace(layer, ranks=others(layer.name)) for layer in layers]
    elsewhere = {name: layer for each in ranks for name, layer in each.items() if name not in mine}
    return here + [
        Layer(name, layer.num_features, ranks={rank: None for rank, each in enumerate(ranks) if name not in each})
        for name, layer in elsewhere.items()
    ]


def _written(layers: Sequence[Layer]) -> bytes:
    """Layers in JSON: the shortest digits that give the same floats."""
    return json.dumps([_entries(layer) for layer in layers], sort_keys=True).encode()


def _entries(layer: Layer) -> dict[str, Any]:
    arrays = {name: getattr(layer, name) for name in (*ARRAYS, *COUNTERS)}
    plain = {name: getattr(layer, name) for name in _PLAIN} | {"dtypes": dict(layer.dtypes)}
    return plain | {name: array.tolist() for name, array in arrays.items() if array is not None}


def _read(written: bytes) -> dict[str, Layer]:
    """By name."""
    return {entries["name"]: Layer(**_arrays(entries)) for entries in json.loads(written)}


def _arrays(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries with arrays in place of lists."""
    types = dict.fromkeys(ARRAYS, "float64") | dict.fromkeys(COUNTERS, "int64")
    return {name: np.array(value, types[name]) if name in types else value for name, value in entries.items()}
