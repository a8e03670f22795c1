"""Nodes of the canonical tree on the host, in NumPy: merged to maximal aligned blocks and to the root, and what
normalisation needs of that.

Moments hold few nodes, so plain float64 arithmetic on all channels at once is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn import reference
from cubn._floating_point import default_floating_point
from cubn._tree import Block, pair_order
from cubn._types import Nodes, Statistics

Float64 = NDArray[np.float64]


@default_floating_point
def merge(nodes: Nodes) -> Nodes:
    """Moments of the same neighbouring blocks with every complete aligned pair merged: one row per maximal block."""
    steps, rows, blocks = pair_order(nodes.blocks)
    found = _each(nodes)
    for left, right in steps:
        found[left] = reference.merge(found[left], found[right])
    return joined(blocks, *(np.array([found[row][part] for row in rows]) for part in range(3))) if rows else nodes


@default_floating_point
def root(nodes: Nodes) -> tuple[Any, Float64, Float64]:
    """(count (), mean (C,), m2 (C,)) of all rows, which must be neighbours; absent rows are the identity."""
    if not nodes.blocks:
        zeros = np.zeros(nodes.first.shape[1])
        return np.zeros((), np.int64), zeros, zeros.copy()
    count, mean, m2 = reference.root(nodes.blocks, _each(nodes), reference.merge)
    return count, mean, m2


@default_floating_point
@np.errstate(all="ignore")
def statistics(count: int, mean: Float64, m2: Float64, eps: float) -> Float64:
    """What normalisation needs of moments: the memory of `Statistics` without gamma and beta."""
    C = len(mean)
    memory = np.zeros(Statistics.size(C))
    found = Statistics(memory, 0, C, gamma=False, beta=False)
    found.count[...] = count
    found.mean[:], found.m2[:] = mean, m2
    np.divide(m2, np.float64(count), out=found.var)
    found.invstd[:] = 1 / np.sqrt(found.var + eps)
    return memory


def joined(blocks: tuple[Block, ...], count: NDArray[np.int64], first: Float64, second: Float64) -> Nodes:
    """Nodes of their parts."""
    rows, C = first.shape
    table = np.empty((rows, 1 + 2 * C))
    table[:, 0], table[:, 1 : 1 + C], table[:, 1 + C :] = count.view(np.float64), first, second
    return Nodes(blocks, table)


def _each(nodes: Nodes) -> list[reference.Node]:
    """The rows one by one, in arrays of their own; a count is of shape ()."""
    return [
        (np.array(count), first.copy(), second.copy())
        for count, first, second in zip(nodes.count, nodes.first, nodes.second, strict=True)
    ]
