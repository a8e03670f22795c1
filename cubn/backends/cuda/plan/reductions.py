"""Statistics and the sums of a gradient: a pass that leaves rows of nodes, and what merges them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate

from cubn._tree import COLUMNS
from cubn._types import ITEMSIZE, Extents, Operands, ReluGradient
from cubn.backends.cuda.plan.launch import (
    ELEMENTS,
    NODE_BYTES,
    OCTET,
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
from cubn.backends.cuda.plan.tree import Tree, tree_of

MOST_NODES = 1024  # of a block, in shared memory; to be measured
MERGED_ROWS = 256  # rows of nodes that one block merges; to be measured
MERGED_BYTES = 40 << 10  # the shared memory it uses for that
MOST_ROUNDS = 16  # of 256 columns in a block of reduce_channels; to be measured


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
        reduce, rows = _cut_channels(extents, common, tree, vector, limits)
    else:
        reduce, rows = _cut_tiles(extents, layout, common, tree, limits)
    merges = []
    left = rows
    while left > MERGED_ROWS:
        merge = merge_rows(extents.C, what, left, MERGED_ROWS)
        left = -(-left // MERGED_ROWS)
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
    lanes = WARP if S > COLUMNS else power_above(-(-S // OCTET))
    group = 1 if lanes == WARP else min(WARP, power_below(C))
    across = -(-C // group)
    padded = N << tree.log2_tiles
    at_once = THREADS // lanes
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


def _cut_channels(
    extents: Extents, common: tuple[str, ...], tree: Tree, vector: int, limits: Limits
) -> tuple[Launch, int]:
    """reduce_channels: threads lie over the channels and share 256 columns a round."""
    N, C, S = extents
    lanes = min(WARP, power_above(-(-C // vector)))
    depth = lanes.bit_length() - 1
    tile_depth = power_above(min(S, COLUMNS)).bit_length() - 1
    group = lanes * vector
    across = -(-C // group)
    padded = N << tree.log2_tiles
    tiles_a_round = COLUMNS >> tile_depth
    span = _span(padded, across, tiles_a_round, MOST_ROUNDS * tiles_a_round, limits)
    rows = -(-padded // span)
    options = (
        *common,
        *option(TILE_ROWS=1 if S <= COLUMNS else 8, VECTOR=vector, DEPTH=depth, TILE_DEPTH=tile_depth),
    )
    fields = {**sizes(extents), **tree.fields, "span": span, "group": group, "blocks_across": across}
    shared = group * (span // tiles_a_round) * NODE_BYTES
    return Launch("reduce_channels", options, rows * across, shared, tuple(fields.items()), octets="nhwc"), rows


def _merge_group(rows: int, C: int) -> int:
    return min(power_above(C), WARP, power_below(MERGED_BYTES // (rows * (NODE_BYTES + 8))))


@functools.lru_cache(1024)
def merge_rows(C: int, what: What, rows: int, merged: int) -> Launch:
    """Every `merged` rows into one."""
    group = _merge_group(merged, C)
    across = -(-C // group)
    shared = merged * (group * NODE_BYTES + 8)
    fields = {"channels": C, "from_rows": rows, "merged": merged, "group": group, "blocks_across": across}
    options = option(KIND=what, ACC="double", FINISH_MOMENTS=what == "Moments")
    return Launch("merge_rows", options, -(-rows // merged) * across, shared, tuple(fields.items()))


@functools.lru_cache(1024)
def finish(C: int, what: What, rows: int, dtype: str) -> Launch:
    """The last merge, and what follows from the root."""
    group = _merge_group(rows, C)
    options = option(KIND=what, ACC=acc_of(dtype), FINISH_MOMENTS=what == "Moments")
    fields = {"channels": C, "from_rows": rows, "group": group}
    shared = rows * (group * NODE_BYTES + 8)
    return Launch("finish", options, -(-C // group), shared, tuple(fields.items()), file="merge_rows")


@functools.lru_cache(1024)
def root(C: int, what: What, merges: tuple[int, ...]) -> Launch:
    """All nodes of a table into one; `merges` as from `_tree.stack_order`."""
    waiting = accumulate((1 - count for count in merges[:-1]), initial=0)
    shared = max(waiting) * WARP * (NODE_BYTES + 8)
    fields = {"channels": C, "table_rows": len(merges)}
    return Launch("root", option(KIND=what), -(-C // WARP), shared, tuple(fields.items()), threads=WARP)
