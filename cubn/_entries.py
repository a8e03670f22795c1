"""What was written down of Moments, checked before anything is computed of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn import _nodes
from cubn._arguments import as_int, flag, plain, stored
from cubn._tree import Block
from cubn._types import Nodes
from cubn.errors import message

Float64 = NDArray[np.float64]

ENTRIES = ("start", "stop", "exact", "blocks", "count", "mean", "m2")

MOST = 1 << 62
"""Samples and values are fewer than this, so that no sum of two counts overflows."""


class Entries(NamedTuple):
    """Those of Moments."""

    start: int
    stop: int
    exact: bool
    nodes: Nodes


def checked_entries(d: Mapping[str, Any]) -> Entries:
    """Entries that are all there and fit each other."""
    if not isinstance(d, Mapping):
        raise TypeError(message("d", "be a mapping, as from to_dict", type(d).__name__))
    if missing := [name for name in ENTRIES if name not in d]:
        raise KeyError(message("d", "have every entry of Moments.to_dict", f"no {', '.join(missing)}"))
    start, stop = (as_int(plain(d[name]), name) for name in ("start", "stop"))
    exact = flag(plain(d["exact"]), "exact")
    blocks, nodes = _checked_nodes(d)
    if exact:
        _check_blocks(start, stop, blocks)
    elif (start, stop, blocks) != (0, 0, ((0, 1),)):
        rule = "be [(0, 1)] of the range [0, 0) where exact is False"
        raise ValueError(message("blocks", rule, (start, stop, blocks)))
    return Entries(start, stop, exact, nodes)


def _checked_nodes(entries: Mapping[str, Any]) -> tuple[tuple[Block, ...], Nodes]:
    """Rows of count, mean and m2 that fit each other."""
    kinds = {"blocks": "int64", "count": "int64", "mean": "float64", "m2": "float64"}
    found = {name: stored(entries[name], name, (kind,)) for name, kind in kinds.items()}
    blocks, count, mean, m2 = found.values()
    rows = len(count) if count.ndim == 1 else -1
    C = mean.shape[1] if mean.ndim == 2 else 0
    if not C or blocks.shape != (rows, 2) or mean.shape != (rows, C) or m2.shape != (rows, C):
        got = ", ".join(f"{name} {array.shape}" for name, array in found.items())
        rule = "have shape (rows, C) as m2 has, beside blocks (rows, 2) and count (rows,)"
        raise ValueError(message("mean", rule, got))
    if (count < 0).any() or sum(count.tolist()) >= MOST:
        raise ValueError(message("count", "be 0 or more and less than 2**62 in all", count.tolist()))
    check_not_negative("m2", m2)
    ordered = tuple((lo, hi) for lo, hi in blocks.tolist())
    return ordered, _nodes.joined(ordered, np.ascontiguousarray(count), mean, m2)


def _check_blocks(start: int, stop: int, blocks: tuple[Block, ...]) -> None:
    """Aligned power-of-two blocks of the range, from left to right."""
    at = start
    for lo, hi in blocks:
        size = hi - lo
        if lo < at or size < 1 or size & (size - 1) or lo % size:
            rule = "be aligned power-of-two blocks of samples, from left to right"
            raise ValueError(message("blocks", rule, list(blocks)))
        at = hi
    if not 0 <= start <= at <= stop < 2 * MOST:
        rule = "be from 0 to stop, with the blocks between"
        raise ValueError(message("start", rule, (start, stop, blocks)))


def check_not_negative(name: str, values: Float64) -> None:
    below = np.flatnonzero((values < 0).reshape(-1, values.shape[-1]).any(0))
    if below.size:
        rule = "be 0 or more, as a sum of squares is"
        raise ValueError(message(name, rule, f"less in channels {below[:10].tolist()}"))
