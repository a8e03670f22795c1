"""A whole training step or gradient in one kernel that reads x twice, but the second time from the level-2 cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

from cubn._tree import COLUMNS, TILE
from cubn._types import ITEMSIZE, Extents, Operands
from cubn.backends.cuda.plan.launch import (
    ELEMENTS,
    NODE_BYTES,
    OCTET,
    THREADS,
    WIDE_CHANNELS,
    Launch,
    Layout,
    Limits,
    Options,
    flags,
    given,
    option,
    power_above,
    power_below,
    read_twice,
    sizes,
)
from cubn.backends.cuda.plan.layouts import goes_on, layout_of
from cubn.backends.cuda.plan.reductions import vector_of
from cubn.backends.cuda.plan.tree import lanes_of, tree_of

BLOCKS = {"float64": 1}  # of a multiprocessor, that registers are left for; 2 of the other dtypes
CACHE_SHARE = 2  # the part of the cache that is counted on: what is written passes through it too; to be measured
PIECE_BYTES = 64 << 10  # of x and dy, that a block reduces or applies at a time, or one unit more; to be measured
RUN_BYTES = 512  # of a sample, from which a group needs no more channels; to be measured
SLICES = (128, 64)  # bytes of neighbouring channels; memory moves no fewer than 64 well; to be measured
FEW_POSITIONS = 4  # of a sample, up to which a thread's nodes of wide channels would not fit registers
MERGED_BYTES = 32 << 10  # the shared memory that merges a group's nodes; to be measured


def ticketed(
    extents: Extents, operands: Operands, relu_mask: Layout | None, options: Options, limits: Limits
) -> Launch | None:
    """One kernel for a whole training step or gradient whose channels fit the cache, where all of it does not."""
    N, C, S = extents
    dtype = operands.x.dtype
    if read_twice(options) * N * C * S * ITEMSIZE[dtype] <= limits.l2_bytes // CACHE_SHARE:
        return None
    layout = layout_of(extents, operands, relu_mask)
    if layout == "nchw":
        neighbours = all(o.channel_stride == S for o in given(operands))
        return _ticketed_rows(extents, dtype, neighbours, options, limits)
    if layout == "nhwc" and all(goes_on(extents, o) for o in given(operands)):
        read = Operands(operands.x, operands.g if read_twice(options) == 2 else None)
        return _ticketed_channels(extents, dtype, vector_of(extents, read), options, limits)
    return None


class _Cut(NamedTuple):
    """How work is cut."""

    kernel: str
    options: tuple[str, ...]
    group: int  # channels
    span: int  # tiles of a piece
    piece_bytes: int
    nodes: int  # that a piece leaves of each channel in shared memory


def blocks_of(dtype: str, limits: Limits) -> int:
    """As many as run at a time; the kernels' BLOCKS."""
    return limits.multiprocessors * BLOCKS.get(dtype, 2)


def _ahead(pieces: int, rows: int, piece_bytes: int, dtype: str, limits: Limits) -> int | None:
    """How many pieces reducing is ahead of applying: a group, and while its last nodes are merged, half of the blocks'
    or more; None where so many are too much for the cache.
    """
    blocks = blocks_of(dtype, limits)
    room = limits.l2_bytes // CACHE_SHARE // piece_bytes
    if room < rows + blocks // 2:
        return None
    return min(rows + blocks, room, pieces)


def _group(extents: Extents, dtype: str, neighbours: bool) -> int:
    """Channels of a group: several where a sample has few positions of one, or octets would be torn."""
    _, C, S = extents
    group = 1
    while neighbours and group < C and S <= TILE:
        run = group * S
        if run % OCTET == 0 and run * ITEMSIZE[dtype] >= RUN_BYTES:
            break
        group *= 2
    return group


@functools.lru_cache(1024)
def _ticketed_rows(extents: Extents, dtype: str, neighbours: bool, options: Options, limits: Limits) -> Launch | None:
    N, C, S = extents
    group = _group(extents, dtype, neighbours)
    if S < OCTET or C * S % OCTET or group * S % OCTET:
        return None
    tile_bytes = read_twice(options) * group * min(S, TILE) * ITEMSIZE[dtype]
    tree = tree_of(S, dtype)
    span = min(power_below(max(PIECE_BYTES // tile_bytes, 1)), power_above(N << tree.log2_tiles))
    lanes = lanes_of(S, THREADS // (span * group))
    specialised = (*option(GROUPED=group > 1, TILE_LANES=lanes), *tree.options)
    return _launch(extents, dtype, _Cut("ticketed", specialised, group, span, span * tile_bytes, span), options, limits)


@functools.lru_cache(1024)
def _ticketed_channels(extents: Extents, dtype: str, vector: int, options: Options, limits: Limits) -> Launch | None:
    N, C, S = extents
    item = ITEMSIZE[dtype]
    if C % OCTET or vector * item < WIDE_CHANNELS:
        return None
    narrow = S <= FEW_POSITIONS and item < WIDE_CHANNELS
    bytes_a_thread = WIDE_CHANNELS // 2 if narrow else WIDE_CHANNELS
    tree = tree_of(S, dtype)
    tile_depth = power_above(min(S, COLUMNS)).bit_length() - 1
    tiles = COLUMNS >> tile_depth  # of a pass
    most = power_above(-(-(N << tree.log2_tiles) // tiles))
    for width in SLICES[1:] if narrow else SLICES:
        pass_bytes = read_twice(options) * tiles * min(S, TILE) * width
        passes = min(power_below(max(PIECE_BYTES // pass_bytes, 1)), most)
        specialised = option(
            TILE_ROWS=tree.rows_of_first,
            VECTOR=bytes_a_thread // item,
            DEPTH=(width // bytes_a_thread).bit_length() - 1,
            TILE_DEPTH=tile_depth,
        )
        cut = _Cut("ticketed_channels", specialised, width // item, passes * tiles, passes * pass_bytes, passes)
        if launch := _launch(extents, dtype, cut, options, limits):
            return launch
    return None


def _launch(extents: Extents, dtype: str, cut: _Cut, options: Options, limits: Limits) -> Launch | None:
    """Where what is under way fits the cache, and nodes fit shared memory."""
    N, C, S = extents
    tree = tree_of(S, dtype)
    rows = -(-(N << tree.log2_tiles) // cut.span)
    pieces = rows * -(-C // cut.group)
    ahead = _ahead(pieces, rows, cut.piece_bytes, dtype, limits)
    if ahead is None or NODE_BYTES * rows > MERGED_BYTES:
        return None
    at_once = min(cut.group, power_below(MERGED_BYTES // (NODE_BYTES * power_above(rows))))
    fields = {
        **sizes(extents),
        **tree.fields,
        "span": cut.span,
        "group": cut.group,
        "rows": rows,
        "pieces": pieces,
        "ahead": ahead,
        "at_once": at_once,
    }
    return Launch(
        cut.kernel,
        (*option(ELEMENT=ELEMENTS[dtype], THREADS=THREADS, CLUSTER=1), *cut.options, *flags(options)),
        min(blocks_of(dtype, limits), 2 * pieces),
        NODE_BYTES * max(cut.group * cut.nodes, at_once * power_above(rows)),
        tuple(fields.items()),
        octets="nchw" if cut.kernel == "ticketed" else "nhwc",
    )
