"""Which samples of a batch form a ghost batch, and where those of a rank stand in it. Everything here is integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from cubn._tree import Block, aligned_blocks


class Cut(NamedTuple):
    """Of which trees the samples of a batch are the leaves."""

    size: int = 0
    """Samples of a group, each of which has a tree of its own; 0 where there are no groups."""
    whole: bool = True
    """Whether all samples together are a tree."""


class Piece(NamedTuple):
    """Neighbouring samples of a rank that are in one group."""

    group: int
    start: int
    """Of the first one, in its group."""
    lo: int
    hi: int
    """[lo, hi) among the rank's samples."""


def group_ranges(N: int, size: int) -> tuple[Block, ...]:
    """The samples [lo, hi) of each group: N // size groups, one at least, of which the last takes the rest."""
    starts = range(0, max(1, N // size) * size, size)
    return tuple(pairwise((*starts, N)))


@lru_cache(256)
def pieces(first: int, stop: int, N: int, size: int) -> tuple[Piece, ...]:
    """The pieces of samples [first, stop) of N."""
    last = max(1, N // size) - 1
    found = []
    lo = first
    while lo < stop:
        group = min(lo // size, last)
        hi = stop if group == last else min(stop, (group + 1) * size)
        found.append(Piece(group, lo - group * size, lo - first, hi - first))
        lo = hi
    return tuple(found)


def blocks_of(first: int, stop: int, N: int, cut: Cut) -> tuple[Block, ...]:
    """The aligned blocks of samples [first, stop) of N, in each tree by indices of its own: groups, then the whole."""
    in_groups = pieces(first, stop, N, cut.size) if cut.size else ()
    return (
        *(block for _, start, lo, hi in in_groups for block in aligned_blocks(start, start + hi - lo)),
        *(aligned_blocks(first, stop) if cut.whole else ()),
    )


@lru_cache(32)  # few, since one grows with the number of ranks
def rows_by_tree(samples: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The rows that all ranks give, one below the other, in the order of the trees: groups, then the whole."""
    N, row = sum(samples), 0
    found: list[tuple[int, int]] = []
    for first, stop in pairwise(accumulate(samples, initial=0)):
        trees = [(piece.group, piece.start, piece.hi - piece.lo) for piece in pieces(first, stop, N, cut.size)]
        if cut.whole:
            trees.append((N, first, stop - first))  # behind all groups
        for tree, start, length in trees:
            for _ in aligned_blocks(start, start + length):
                found.append((tree, row))
                row += 1
    return tuple(row for _, row in sorted(found))


def tree_slices(blocks: Sequence[Block]) -> tuple[slice, ...]:
    """The rows of each tree, where those of one are behind those of another: a tree begins with its sample 0."""
    starts = [row for row, (lo, _) in enumerate(blocks) if lo == 0 or row == 0]
    return tuple(slice(*rows) for rows in pairwise((*starts, len(blocks))))
