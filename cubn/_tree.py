"""Index arithmetic of the canonical tree: which values form a leaf, which samples form a block, what merges with what.

Inside a sample, tiles of ROWS x COLUMNS positions are the leaves. Over samples the tree is the binary tree on the
*global* sample index; a contiguous range of samples is represented by one node per maximal aligned power-of-two block.
Everything here is integers: the same functions order moments and sums, on any device. The arithmetic of a merge is
stated in `cubn.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

ROWS = 8
COLUMNS = 256
TILE = ROWS * COLUMNS
"""Positions in a tile: position TILE * t + COLUMNS * r + j is row r of column j of tile t."""

Block = tuple[int, int]
"""Global samples [lo, hi); hi - lo is a power of two that divides lo."""

Step = tuple[int, int]
"""(left, right): the node in row `right` is merged into the one in row `left`, which keeps the result."""


def aligned_blocks(start: int, stop: int) -> tuple[Block, ...]:
    """Cut samples [start, stop) into maximal aligned power-of-two blocks, left to right.

    Parameters
    ----------
    start, stop : int
        Global sample indices, 0 <= start.

    Returns
    -------
    tuple of (int, int)
        Neighbouring blocks; none when the range is empty.
    """
    blocks = []
    while start < stop:
        size = 1 << ((stop - start).bit_length() - 1)
        if start:
            size = min(size, start & -start)
        blocks.append((start, start + size))
        start += size
    return tuple(blocks)


def pair_order(blocks: Sequence[Block]) -> tuple[tuple[Step, ...], tuple[int, ...], tuple[Block, ...]]:
    """Merge complete aligned pairs until none is left.

    Parameters
    ----------
    blocks : sequence of (int, int)
        Neighbouring aligned blocks, left to right, one per row.

    Returns
    -------
    steps : tuple of (int, int)
        The merges, in an order in which they can be done.
    rows : tuple of int
        The rows that remain.
    remaining : tuple of (int, int)
        Their blocks: the maximal aligned blocks of the range.
    """
    steps: list[Step] = []
    rows: list[int] = []
    remaining: list[Block] = []
    for row, (lo, hi) in enumerate(blocks):
        while remaining and _is_left_sibling(remaining[-1], (lo, hi)):
            steps.append((rows[-1], row))
            row, lo = rows.pop(), remaining.pop()[0]
        rows.append(row)
        remaining.append((lo, hi))
    return tuple(steps), tuple(rows), tuple(remaining)


def root_order(blocks: Sequence[Block]) -> tuple[Step, ...]:
    """Merge all rows into the root of the tree; samples outside the blocks are absent.

    An absent sibling is the identity, so its neighbour moves up alone. However a range was cut into blocks, the steps
    amount to the same tree.

    Parameters
    ----------
    blocks : sequence of (int, int)
        Neighbouring aligned blocks, left to right, one per row.

    Returns
    -------
    tuple of (int, int)
        The merges, in an order in which they can be done; the root ends in row 0.
    """
    steps: list[Step] = []
    nodes = [(lo, row) for row, (lo, _) in enumerate(blocks)]
    size = 1
    while len(nodes) > 1:
        size *= 2
        parents: list[tuple[int, int]] = []
        for lo, row in nodes:
            if parents and parents[-1][0] == lo // size:
                steps.append((parents[-1][1], row))
            else:
                parents.append((lo // size, row))
        nodes = [(parent * size, row) for parent, row in parents]
    return tuple(steps)


def stack_order(blocks: Sequence[Block]) -> tuple[int, ...]:
    """The merges of `root_order` for one who takes rows from left to right and puts each on a stack.

    Parameters
    ----------
    blocks : sequence of (int, int)
        Neighbouring aligned blocks, left to right, one per row.

    Returns
    -------
    tuple of int
        For each row, how often the last two nodes of the stack become one after it was put there.
    """
    merges = [0] * len(blocks)
    last = list(range(len(blocks)))  # row of the node that has grown in each row
    for left, right in root_order(blocks):
        merges[last[right]] += 1
        last[left] = last[right]
    return tuple(merges)


def _is_left_sibling(left: Block, right: Block) -> bool:
    size = right[1] - right[0]
    return left[1] - left[0] == size and left[1] == right[0] and left[0] % (2 * size) == 0
