"""What the CPU backend gives for arrays that reach every kernel, as digests that the repository holds.

    python -m tests.gpu.digests         computes them anew, into tests/gpu/digests.json

A device is then compared with the CPU by what is in this folder alone: nothing is compiled for the CPU, and no random
numbers of a library are in it. One digest serves all layouts, whose results have the same bits.
"""

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests import oracle
from tests.gpu.results import run_everything, run_training
from tests.ops import arrays

FILE = Path(__file__).with_name("digests.json")

SHAPES = {
    "resident": (3, 10, 30),
    "resident, grouped": (4, 9, 7),
    "resident, wild": (5, 12, 30),
    "resident, cluster": (4, 3, 5000),
    "resident, channels": (30, 12, 6),
    "resident, 2-d": (70, 24),
    "resident, 2-d, cluster": (3000, 40),
    "two passes": (2, 2, 600_001),
    "2-d": (70_000, 16),
    "tickets": (2, 8, 820_000),
    "tickets, channels": (820, 256, 64),
}
"""The last two are as small as one kernel takes that reads twice: more than half of an H100's level-2 cache."""
LAYOUTS = ("dense", "channels_last", "sliced")
NONE = "-"  # for a result that a case is not asked for


class Case(NamedTuple):
    """One set of arrays."""

    shape: str
    dtype: str
    layout: str

    def __str__(self):
        return f"{self.shape}; {self.dtype}; {self.layout}"


LARGE = [
    Case(shape, dtype, layout)
    for shape, layout in (("tickets", "dense"), ("tickets, channels", "channels_last"))
    for dtype in ("bfloat16", "float32")
]
"""Of these, results of training alone."""
SMALL = [
    Case(shape, dtype, layout)
    for shape in SHAPES
    for dtype in arrays.DTYPES
    for layout in LAYOUTS
    if "tickets" not in shape
]
CASES = SMALL + LARGE
CLUSTERS = (
    Case("resident, cluster", "float32", "dense"),
    Case("resident, cluster", "bfloat16", "channels_last"),
    Case("resident, 2-d, cluster", "bfloat16", "dense"),
)
"""Small ones that are kept on chip by clusters of blocks."""


# --- arrays -----------------------------------------------------------------------------------------------------------


def bits(count, seed):
    """64 pseudo-random bits each: SplitMix64, in integers."""
    z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def values(shape, dtype, seed):
    """A store of values in (-1, 3), bell-shaped about 1: sums of four, their mantissas filled to the end."""
    count = math.prod(shape)
    sums = bits(count, seed).view(np.uint16).reshape(count, 4).sum(axis=1, dtype=np.int64)
    centred = (sums - 2 * 65535) / 65537 + 1
    return oracle.narrow(centred.reshape(shape), np.dtype(arrays.STORES[dtype]))


def stores(case):
    """x, dy and residual in the case's layout, and a mask."""
    shape = SHAPES[case.shape]
    made = [values(shape, case.dtype, seed) for seed in range(3)]
    if "wild" in case.shape:  # NaN, infinite, subnormal, near overflow: each at home in a channel
        for channel, value in enumerate(arrays.WILD):
            made[0][channel % 5, channel, channel] = oracle.narrow(np.array([value]), made[0].dtype)[0]
    made = [arrays.in_memory(store, case.layout, 1) for store in made]
    positions = (shape[0], *shape[2:])
    return *made, (bits(math.prod(positions), 3) % np.uint64(8) != 0).reshape(positions)


# --- digests ----------------------------------------------------------------------------------------------------------


def digest(store):
    """64 bits of the SHA-256 of dtype, shape and values, all NaN being one and -0 being 0."""
    values = np.array(oracle.widen(np.asarray(store)), order="C")
    if values.dtype.kind == "f":
        values[np.isnan(values)] = np.nan
        values[values == 0] = 0
    named = f"{np.asarray(store).dtype.name} {np.shape(store)} "
    return hashlib.sha256(named.encode() + values.tobytes()).hexdigest()[:16]


def results(case, carry):
    """Every result by name, of arrays that `carry` makes of the case's."""
    *given, mask = stores(case)
    if case in LARGE:
        return run_training(*map(carry, given))
    return run_everything(*map(carry, (*given, mask)))


def computed(case, carry, store_of):
    return {name: digest(store_of(array)) for name, array in results(case, carry).items()}


def on_cpu(case):
    return computed(case, lambda store: arrays.carry(store, "numpy"), arrays.store_of)


@functools.cache
def _held():
    return json.loads(FILE.read_text())


def expected(case):
    """The case's digests by name, from the file."""
    held = _held()
    digests = held["digests"][f"{case.shape}; {case.dtype}"].split()
    return {name: digest for name, digest in zip(held["results"], digests, strict=True) if digest != NONE}


def main():
    found = {}
    for case in CASES:
        if case in LARGE or case.layout == LAYOUTS[0]:
            found[f"{case.shape}; {case.dtype}"] = on_cpu(case)
            print(case, flush=True)
    names = list(found[f"{SMALL[0].shape}; {SMALL[0].dtype}"])
    lines = {case: " ".join(digests.get(name, NONE) for name in names) for case, digests in found.items()}
    FILE.write_text(json.dumps({"results": names, "digests": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
