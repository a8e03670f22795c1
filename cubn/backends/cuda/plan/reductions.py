"""Statistics and the sums of a gradient: a pass that leaves rows of nodes, and what merges them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, isqrt
from typing import NamedTuple

from cubn._tree import COLUMNS
from cubn._types import ITEMSIZE, Extents, Operands, ReluGradient
from cubn.backends.cuda.plan.launch import (
    ELEMENTS,
    NODE_BYTES,
    THREADS,
    WARP,
    WAVES,
    WIDE_CHANNELS,
    Launch,
    Layout,
    Limits,
    What,
    acc_of,
    given,
    option,
    power_above,
    power_below,
    reduction_flags,
    sizes,
)
from cubn.backends.cuda.plan.layouts import are_vectors, position_step
from cubn.backends.cuda.plan.tree import Tree, lanes_of, tree_of

ROWS_BLOCKS = 6  # of a multiprocessor, or half: fewer lanes a tile are fewer blocks of reduce_rows; to be measured
MOST_NODES = 1024  # of a block, in shared memory; to be measured
MERGED_ROWS = 1024  # rows of nodes that one block merges at most: more take longer than a second launch; to be measured
MERGED_RUN = 4  # of these, what a thread merges in registers; see RUN in merge_rows.cu
MERGED_BYTES = 40 << 10  # the shared memory it uses for the others
MERGED_CHANNELS = 4  # of a block at least: memory moves no fewer than 32 bytes
MERGING_BLOCKS = 128  # from which a block rather has more channels; to be measured
MOST_ROUNDS = 16  # of 256 columns in a block of reduce_channels; to be measured
NARROW_BYTES = 64  # of neighbouring channels, of a block of reduce_channels at least; to be measured
TURNS = 1.75  # of the blocks that a multiprocessor has at a time, so that they need not end together; to be measured
AS_SOON = 9 / 8  # times as long is no later: blocks are not in step; to be measured


@dataclass(frozen=True)
class ReductionPlan:
    """A pass over x (and dy) that leaves rows of nodes, and the launches that merge them until `finish` can."""

    reduce: Launch
    rows: int
    merges: tuple[tuple[Launch, int], ...]  # with the rows each leaves


@functools.lru_cache(1024)
def reduction(
    extents: Extents, layout: Layout, what: What, relu: ReluGradient, dtype: str, vector: int, limits: Limits
) -> ReductionPlan:
    """The reduction of a non-empty array. `vector`: channels that a thread of reduce_channels can read at a time."""
    tree = tree_of(extents.S, dtype)
    common = (*option(ELEMENT=ELEMENTS[dtype]), *reduction_flags(what, relu))
    if layout == "nhwc":
        reduce, rows = _cut_channels(extents, common, tree, vector, ITEMSIZE[dtype], limits)
    else:
        reduce, rows = _cut_tiles(extents, layout, common, tree, limits)
    merges = []
    left = rows
    while left > MERGED_ROWS:
        merged = min(MERGED_ROWS, power_above(isqrt(left)))  # as many as are left of them
        merge = merge_rows(extents.C, what, left, merged)
        left = -(-left // merged)
        merges.append((merge, left))
    return ReductionPlan(reduce, rows, tuple(merges))


def vector_of(extents: Extents, operands: Operands) -> int:
    """How many neighbouring channels a thread of reduce_channels reads at a time."""
    vector = max(1, WIDE_CHANNELS // ITEMSIZE[operands.x.dtype])
    while vector > 1 and not (
        extents.C % vector == 0
        and all(
            are_vectors(o, (o.sample_stride, position_step(o)), vector * ITEMSIZE[o.dtype]) for o in given(operands)
        )
    ):
        vector //= 2
    return vector


def _span(tiles: int, across: int, least: int, most: int, limits: Limits) -> int:
    """Tiles of a row of nodes: as many as leave blocks enough for the device."""
    span = least
    while 2 * span <= most and span < tiles and -(-tiles // (2 * span)) * across >= WAVES * limits.multiprocessors:
        span *= 2
    return span


def _cut_tiles(
    extents: Extents, layout: Layout, common: tuple[str, ...], tree: Tree, limits: Limits
) -> tuple[Launch, int]:
    """reduce_rows and reduce_strided: lanes share a tile, warps share the tiles of a block."""
    N, C, S = extents
    padded = N << tree.log2_tiles
    most = THREADS * ROWS_BLOCKS * limits.multiprocessors // (padded * C) if layout == "nchw" else WARP
    lanes = lanes_of(S, most)
    at_once = THREADS // lanes
    group = 1 if lanes == WARP else min(WARP, at_once, power_below(C))
    across = -(-C // group)
    least = min(max(1, at_once // group), power_above(padded))
    span = _span(padded, across, least, MOST_NODES // group, limits)
    rows = -(-padded // span)
    shared = span * group * NODE_BYTES
    options = (*common, *option(TILE_LANES=lanes))
    if layout == "nchw":
        options += tree.options
    else:
        shared += span * 8
    fields = {**sizes(extents), **tree.fields, "span": span, "group": group, "blocks_across": across}
    kernel, octets = ("reduce_rows", "nchw") if layout == "nchw" else ("reduce_strided", "")
    return Launch(kernel, options, rows * across, shared, tuple(fields.items()), octets=octets), rows


class _Cut(NamedTuple):
    """What a block of reduce_channels has of everything."""

    lanes: int  # side by side over the channels
    rounds: int  # of 256 columns each
    rows: int  # of nodes, which all blocks leave
    across: int  # blocks side by side over the channels
    resident: int  # blocks of a multiprocessor, that registers are left for

    def turns(self, limits: Limits) -> float:
        """Of the blocks that a multiprocessor has at a time."""
        return self.rows * self.across / (self.resident * limits.multiprocessors)

    def duration(self, limits: Limits) -> int:
        """Until the last block is done."""
        return self.lanes * self.rounds * ceil(self.turns(limits))


def _cuts(C: int, vector: int, item: int, tile_depth: int, rounds: int) -> Iterator[_Cut]:
    """Of so many rounds in all. Fewer lanes are more blocks, which merge more through shared memory."""
    lanes = min(WARP, power_above(-(-C // vector)))
    while True:
        nodes = vector * (lanes.bit_length() - 1 - tile_depth)  # in double, that a thread holds
        of_block = 1
        while of_block == 1 or (of_block <= MOST_ROUNDS and of_block < 2 * rounds):
            yield _Cut(lanes, of_block, -(-rounds // of_block), -(-C // (lanes * vector)), 2 if nodes < 4 else 1)
            of_block *= 2
        if lanes * vector * item <= NARROW_BYTES:
            break
        lanes //= 2


def _cut_channels(
    extents: Extents, common: tuple[str, ...], tree: Tree, vector: int, item: int, limits: Limits
) -> tuple[Launch, int]:
    """reduce_channels: threads lie over the channels and share 256 columns a round."""
    N, C, S = extents
    tile_depth = power_above(min(S, COLUMNS)).bit_length() - 1
    tiles_a_round = COLUMNS >> tile_depth
    cuts = list(_cuts(C, vector, item, tile_depth, -(-(N << tree.log2_tiles) // tiles_a_round)))
    cuts = [cut for cut in cuts if cut.rows <= MERGED_ROWS] or cuts  # rather no launch between this and `finish`
    soonest = min(cut.duration(limits) for cut in cuts)
    as_soon = [cut for cut in cuts if cut.duration(limits) <= AS_SOON * soonest]
    cut = max(as_soon, key=lambda cut: (min(cut.turns(limits), TURNS), cut.lanes, cut.rounds))
    options = option(
        TILE_ROWS=tree.rows_of_first,
        VECTOR=vector,
        DEPTH=cut.lanes.bit_length() - 1,
        TILE_DEPTH=tile_depth,
        BLOCKS=cut.resident,
    )
    group = cut.lanes * vector
    span = cut.rounds * tiles_a_round
    fields = {**sizes(extents), **tree.fields, "span": span, "group": group, "blocks_across": cut.across}
    shared = group * cut.rounds * NODE_BYTES
    launch = Launch(
        "reduce_channels", (*common, *options), cut.rows * cut.across, shared, tuple(fields.items()), octets="nhwc"
    )
    return launch, cut.rows


def _merging(rows: int, C: int) -> tuple[int, int]:
    """Channels of a block that merges so many rows, and its shared memory."""
    of_channel = -(-rows // MERGED_RUN) * (NODE_BYTES + 8)
    wanted = max(MERGED_CHANNELS, power_above(-(-C // MERGING_BLOCKS)))
    group = min(power_above(C), WARP, wanted, power_below(MERGED_BYTES // of_channel))
    return group, group * of_channel


@functools.lru_cache(1024)
def merge_rows(C: int, what: What, rows: int, merged: int) -> Launch:
    """Every `merged` rows into one."""
    group, shared = _merging(merged, C)
    across = -(-C // group)
    fields = {"channels": C, "from_rows": rows, "merged": merged, "group": group, "blocks_across": across}
    options = option(KIND=what, ACC="double", FINISH_MOMENTS=what == "Moments")
    return Launch("merge_rows", options, -(-rows // merged) * across, shared, tuple(fields.items()))


@functools.lru_cache(1024)
def finish(C: int, what: What, rows: int, dtype: str) -> Launch:
    """The last merge, and what follows from the root."""
    group, shared = _merging(rows, C)
    options = option(KIND=what, ACC=acc_of(dtype), FINISH_MOMENTS=what == "Moments")
    fields = {"channels": C, "from_rows": rows, "group": group}
    return Launch("finish", options, -(-C // group), shared, tuple(fields.items()), file="merge_rows")


@functools.lru_cache(1024)
def root(C: int, what: What, merges: tuple[int, ...]) -> Launch:
    """All nodes of a table into one; `merges` as from `_tree.stack_order`."""
    waiting = accumulate((1 - count for count in merges[:-1]), initial=0)
    shared = max(waiting) * WARP * (NODE_BYTES + 8)
    fields = {"channels": C, "table_rows": len(merges)}
    return Launch("root", option(KIND=what), -(-C // WARP), shared, tuple(fields.items()), threads=WARP)
