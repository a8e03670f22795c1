"""Nodes of the canonical tree on the host: merged to maximal aligned blocks, and to the root. In NumPy.

Few nodes leave a device, or arrive from another rank, so plain float64 arithmetic on all channels at once is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn import reference
from cubn._tree import pair_order
from cubn.backends import Nodes

Float64 = NDArray[np.float64]


def merge(nodes: Nodes) -> Nodes:
    """Moments of the same neighbouring blocks with every complete aligned pair merged: one row per maximal block."""
    steps, rows, blocks = pair_order(nodes.blocks)
    found = _each(nodes)
    for left, right in steps:
        found[left] = reference.merge(found[left], found[right])
    if not rows:
        return nodes
    return Nodes(blocks, *(np.stack([found[row][part] for row in rows]) for part in range(3)))


def root(nodes: Nodes) -> tuple[Any, Float64, Float64]:
    """(count (), mean (C,), m2 (C,)) of all rows, which must be neighbours; absent rows are the identity."""
    count, mean, m2 = _root(nodes, reference.merge)
    return count, mean, m2


def root_sums(nodes: Nodes) -> tuple[Float64, Float64]:
    """(sum_dy (C,), sum_dy_xmu (C,)) of all rows of `Backend.backward_sums`."""
    _, sum_dy, sum_dy_xmu = _root(nodes, reference.add)
    return sum_dy, sum_dy_xmu


def _root(nodes: Nodes, combine: reference.Combine) -> reference.Node:
    if not nodes.blocks:
        zeros = np.zeros(nodes.first.shape[1])
        return np.zeros((), np.int64), zeros, zeros.copy()
    return reference.root(nodes.blocks, _each(nodes), combine)


def _each(nodes: Nodes) -> list[reference.Node]:
    """The rows one by one, in arrays of their own; a count is of shape ()."""
    return [
        (np.array(count), first.copy(), second.copy())
        for count, first, second in zip(nodes.count, nodes.first, nodes.second, strict=True)
    ]
