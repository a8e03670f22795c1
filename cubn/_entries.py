"""What was written down of Moments, checked before anything is computed of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn import _nodes
from cubn._arguments import stored
from cubn._tree import Block
from cubn._types import Nodes
from cubn.errors import message

Float64 = NDArray[np.float64]

ENTRIES = ("start", "stop", "exact", "blocks", "count", "mean", "m2")

MOST = 1 << 62
"""Samples and values are fewer than this, so that no sum of two counts overflows."""


def checked_nodes(entries: Mapping[str, Any]) -> tuple[tuple[Block, ...], Nodes]:
    """Rows of count, mean and m2 that fit each other."""
    kinds = {"blocks": "int64", "count": "int64", "mean": "float64", "m2": "float64"}
    found = {name: stored(entries[name], "from_dict", name, (kind,)) for name, kind in kinds.items()}
    blocks, count, mean, m2 = found.values()
    rows = len(count) if count.ndim == 1 else -1
    C = mean.shape[1] if mean.ndim == 2 else 0
    if not C or blocks.shape != (rows, 2) or mean.shape != (rows, C) or m2.shape != (rows, C):
        got = ", ".join(f"{name} {array.shape}" for name, array in found.items())
        rule = "have shape (rows, C) as m2 has, beside blocks (rows, 2) and count (rows,)"
        raise ValueError(message("from_dict", "mean", rule, got))
    if (count < 0).any() or sum(count.tolist()) >= MOST:
        raise ValueError(message("from_dict", "count", "be 0 or more and less than 2**62 in all", count.tolist()))
    check_not_negative("from_dict", "m2", m2)
    ordered = tuple((lo, hi) for lo, hi in blocks.tolist())
    return ordered, _nodes.joined(ordered, np.ascontiguousarray(count), mean, m2)


def check_blocks(start: int, stop: int, blocks: tuple[Block, ...]) -> None:
    """Aligned power-of-two blocks of the range, from left to right."""
    at = start
    for lo, hi in blocks:
        size = hi - lo
        if lo < at or size < 1 or size & (size - 1) or lo % size:
            rule = "be aligned power-of-two blocks of samples, from left to right"
            raise ValueError(message("from_dict", "blocks", rule, list(blocks)))
        at = hi
    if not 0 <= start <= at <= stop < 2 * MOST:
        rule = "be from 0 to stop, with the blocks between"
        raise ValueError(message("from_dict", "start", rule, (start, stop, blocks)))


def check_not_negative(function: str, name: str, values: Float64) -> None:
    below = np.flatnonzero((values < 0).reshape(-1, values.shape[-1]).any(0))
    if below.size:
        rule = "be 0 or more, as a sum of squares is"
        raise ValueError(message(function, name, rule, f"less in channels {below[:10].tolist()}"))
