"""What a recalibration has pooled so far, and how it is written: as words and arrays, of which messages are made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import count
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cubn._entries import ENTRIES
from cubn._moments import Moments

VERSION = 1
"""Of how records are written."""


class Written(NamedTuple):
    """A record, and what was said of it."""

    header: str
    """JSON."""
    arrays: Mapping[str, NDArray[Any]]


class Record(NamedTuple):
    """Moments of a recalibration under way; never changed, so that whoever interrupts it finds whole batches."""

    done: Mapping[str, Moments] = {}
    """By layer, of all batches and ranks."""
    pools: Mapping[str, tuple[Moments, ...]] = {}
    """By layer, of this rank's batches in the pass under way; one for each of the layer's calls in a forward."""
    batches: int = 0
    """That the pools are of."""
    all_batches: int = 0
    """Of a pass, on all ranks; 0 before the first is done."""

    def written(self, about: Mapping[str, Any]) -> Written:
        """Everything, and what the caller says of it in words and numbers of JSON."""
        names = {
            "done": list(self.done),
            "pools": {name: len(pools) for name, pools in self.pools.items()},
            "batches": self.batches,
            "all_batches": self.all_batches,
        }
        moments = [*self.done.values(), *(pool for pools in self.pools.values() for pool in pools)]
        arrays = {f"{i}.{name}": np.asarray(x) for i, one in enumerate(moments) for name, x in one.to_dict().items()}
        return Written(json.dumps({"version": VERSION, "about": about, "record": names}), arrays)

    @classmethod
    def read(cls, written: Written) -> tuple[Self, dict[str, Any]]:
        """A record, and what was said of it. KeyError, TypeError or ValueError if that is none."""
        header, numbers = json.loads(written.header), count()
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']}")

        def following() -> Moments:
            i = next(numbers)
            return Moments.from_dict({name: written.arrays[f"{i}.{name}"] for name in ENTRIES})

        names = header["record"]
        done = {name: following() for name in names["done"]}
        pools = {name: tuple(following() for _ in range(calls)) for name, calls in names["pools"].items()}
        return cls(done, pools, names["batches"], names["all_batches"]), header["about"]


def as_message(written: Written) -> bytes:
    """A line of JSON, and the arrays one behind the other."""
    arrays = {name: (array.dtype.str, array.shape) for name, array in written.arrays.items()}
    line = json.dumps([written.header, arrays]).encode()
    return b"\n".join([line, b"".join(array.tobytes() for array in written.arrays.values())])


def of_message(said: bytes) -> Written:
    line, _, data = said.partition(b"\n")
    header, described = json.loads(line)
    arrays, at = {}, 0
    for name, (dtype, shape) in described.items():
        values = math.prod(shape)
        arrays[name] = np.frombuffer(data, dtype, values, at).reshape(shape).copy()  # aligned
        at += values * np.dtype(dtype).itemsize
    return Written(header, arrays)
