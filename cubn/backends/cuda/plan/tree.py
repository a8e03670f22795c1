"""The canonical tree inside a sample."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cubn._floating_point import default_floating_point
from cubn._tree import COLUMNS, TILE
from cubn.backends.cuda.plan.launch import Fields, power_above

LEVELS = 8


@dataclass(frozen=True)
class Tree:
    """The tree's shape inside a sample, and what is special about the last tile."""

    tiles: int
    log2_tiles: int
    rows: int
    full: int
    share: tuple[float, ...]
    weight: tuple[float, ...]

    @property
    def fields(self) -> Fields:
        return {
            "tiles": self.tiles,
            "log2_tiles": self.log2_tiles,
            "last.rows": self.rows,
            "last.full": self.full,
            **{f"last.share.{i}": value for i, value in enumerate(self.share)},
            **{f"last.weight.{i}": value for i, value in enumerate(self.weight)},
        }


@functools.lru_cache(1024)
@default_floating_point
def tree_of(S: int, dtype: str) -> Tree:
    """The tree of samples of S positions. Shares are computed in the type that merges them."""
    acc = np.float64 if dtype == "float64" else np.float32
    tiles = -(-S // TILE)
    rows, full = divmod(S - (tiles - 1) * TILE, COLUMNS)
    share, weight = [], []
    for level in range(LEVELS):
        size = 1 << level
        inside = full % (2 * size)  # of the one merge with columns of both kinds
        left = rows * size + min(inside, size)
        right = rows * size + max(inside - size, 0)
        ratio = acc(right) / acc(left + right) if left + right else acc(0)
        share.append(float(ratio))
        weight.append(float(acc(left) * ratio))
    return Tree(tiles, power_above(tiles).bit_length() - 1, rows, full, tuple(share), tuple(weight))
