"""The canonical tree inside a sample."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cubn._floating_point import default_floating_point
from cubn._tree import COLUMNS, ROWS, TILE
from cubn.backends.cuda.plan.launch import OCTET, WARP, Fields, option, power_above, power_below

LEVELS = 8


@dataclass(frozen=True)
class Tree:
    """The tree's shape inside a sample, and what is special about the last tile."""

    tiles: int
    log2_tiles: int
    rows: int  # of the last tile, the last of them maybe short; 0 if it is whole
    is_tall: bool  # whether there is a whole tile
    share: tuple[int, ...]  # the bits of numbers
    weight: tuple[int, ...]

    @property
    def fields(self) -> Fields:
        return {
            "tiles": self.tiles,
            "log2_tiles": self.log2_tiles,
            **{f"last.share.{i}": value for i, value in enumerate(self.share)},
            **{f"last.weight.{i}": value for i, value in enumerate(self.weight)},
        }

    @property
    def rows_of_first(self) -> int:
        """Of the first tile, the last of them maybe short."""
        return ROWS if self.is_tall else self.rows

    @property
    def options(self) -> tuple[str, ...]:
        """Of a kernel whose tiles have neighbouring positions; see kernels/tile.cuh."""
        return option(TILE_ROWS=self.rows, TALL=self.is_tall)


@functools.lru_cache(1024)
@default_floating_point
def tree_of(S: int, dtype: str) -> Tree:
    """The tree of samples of S positions. Shares are computed in the type that merges them."""
    acc, bits = (np.float64, np.int64) if dtype == "float64" else (np.float32, np.uint32)
    tiles = -(-S // TILE)
    length = S - (tiles - 1) * TILE
    rows, full = divmod(length, COLUMNS)  # columns before `full` have one more value
    share, weight = [], []
    for level in range(LEVELS):
        size = 1 << level
        inside = full % (2 * size)  # of the one merge with columns of both kinds
        left = rows * size + min(inside, size)
        right = rows * size + max(inside - size, 0)
        ratio = acc(right) / acc(left + right) if left + right else acc(0)
        share.append(int(ratio.view(bits)))
        weight.append(int((acc(left) * ratio).view(bits)))
    last_rows = 0 if length == TILE else -(-length // COLUMNS)
    log2_tiles = power_above(tiles).bit_length() - 1
    return Tree(tiles, log2_tiles, last_rows, S >= TILE, tuple(share), tuple(weight))


def lanes_of(S: int, most: int) -> int:
    """Lanes of a tile whose positions lie one after the other: at most as many, and none without an octet, where it is
    of one row; else a warp.
    """
    return WARP if S > COLUMNS else min(power_above(-(-S // OCTET)), power_below(max(most, 1)))
