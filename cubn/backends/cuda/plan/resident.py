"""A whole training step or gradient in one kernel, where what it reads twice fits on chip."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from cubn._tree import COLUMNS, TILE
from cubn._types import ITEMSIZE, Extents, NormalizeOptions, Operands
from cubn.backends.cuda.plan.launch import (
    ELEMENTS,
    NODE_BYTES,
    OCTET,
    THREADS,
    VECTOR_BYTES,
    WARP,
    WIDE_CHANNELS,
    Launch,
    Layout,
    Limits,
    Options,
    acc_of,
    flags,
    given,
    has_relu_mask,
    option,
    power_above,
    read_twice,
    sizes,
)
from cubn.backends.cuda.plan.layouts import are_vectors, goes_on, layout_of
from cubn.backends.cuda.plan.tree import lanes_of, tree_of

COEFFICIENTS_BYTES = {"float": 32, "double": 48}  # of a channel, in shared memory
SPLIT_BYTES = 8 << 10  # of a block; splitting a slab further only costs; to be measured
RESERVED_BYTES = 1 << 10  # of shared memory, in every block
NEIGHBOUR_BYTES = 512  # of a sample, from which a block needs no more channels; to be measured
PEELED_BYTES = 1024  # of a sample, from which elements before and after whole vectors no longer matter; to be measured
SLICES = (16, 32, 64)  # bytes of neighbouring channels, of a block; memory moves no fewer than 32
LONE_BYTES = 64 << 10  # of a block: more takes longer than several launches where few blocks share them; to be measured
FEW_BLOCKS = 4  # times which is still less than the multiprocessors; to be measured


def on_chip(
    extents: Extents, operands: Operands, relu_mask: Layout | None, options: Options, limits: Limits
) -> Launch | None:
    """One kernel for a whole training step or gradient, if there is; `relu_mask`: of the one to be read, if any."""
    layout = layout_of(extents, operands, relu_mask)
    if layout == "nhwc":
        return slab_channels(extents, operands, options, limits)
    return slab(extents, operands, options, limits) if layout == "nchw" else None


def slab(extents: Extents, operands: Operands, options: Options, limits: Limits) -> Launch | None:
    """One kernel for a whole training step or gradient, where a channel's x (and, for a gradient, dy) fits on chip."""
    N, C, S = extents
    if 0 in extents:
        return None
    dtype = operands.x.dtype
    neighbours = all(o.channel_stride == S for o in given(operands))
    keep_mask = isinstance(options, NormalizeOptions) and options.keep_mask
    group = _slab_group(extents, ITEMSIZE[dtype], neighbours, keep_mask)
    torn = (group * S % OCTET and group < C) or (C * S % OCTET and N > 1)
    if keep_mask and torn:  # two blocks would write the same byte
        return None
    kept = given(operands)[: read_twice(options)]

    def cut(group: int) -> Launch | None:
        aligned = all(are_vectors(o, (o.sample_stride, group * o.channel_stride)) for o in kept)
        return _slab(extents, dtype, group, aligned, options, limits)

    launch = cut(group)
    while launch and neighbours and 2 * group <= min(C, THREADS) and S <= TILE:  # a thread finishes a channel
        torn = group * S % OCTET != 0 and group * S * ITEMSIZE[dtype] < PEELED_BYTES
        group *= 2
        wider = cut(group)
        if not (wider and _is_better(launch, wider, torn and group * S % OCTET == 0, limits)):
            break
        launch = wider
    return launch


def _is_better(launch: Launch, wider: Launch, mends: bool, limits: Limits) -> bool:
    """Whether blocks of twice the channels are: if octets that were torn are whole then, or blocks by themselves take
    half the turns, for memory rests at each, while blocks begin and while they finish channels. None has more to do
    than others: there are two turns or more, two at a time on a multiprocessor.
    """
    before, after = (-(-blocks // limits.multiprocessors) for blocks in (launch.grid, wider.grid))
    halves = launch.cluster == 1 and after <= before // 2
    return (mends or halves) and after >= 2 and _fits_twice(wider.shared_bytes, limits)


def _slab_group(extents: Extents, item: int, neighbours: bool, keep_mask: bool) -> int:
    """Channels of a block: several where a sample has few positions, or vectors (or bytes of bits) would be torn."""
    _, C, S = extents
    group = 1
    while neighbours and group < C and S <= TILE:
        run = group * S * item
        torn = run % VECTOR_BYTES and run < PEELED_BYTES
        if run >= NEIGHBOUR_BYTES and not torn and not (keep_mask and group * S % OCTET):
            break
        group = min(2 * group, C)
    return group


def _fits_twice(shared: int, limits: Limits) -> bool:
    """Whether a multiprocessor has room for two blocks."""
    return 2 * (shared + RESERVED_BYTES) <= limits.shared_bytes + RESERVED_BYTES


@functools.lru_cache(1024)
def _slab(extents: Extents, dtype: str, group: int, aligned: bool, options: Options, limits: Limits) -> Launch | None:
    N, C, S = extents
    staged = read_twice(options)
    tree = tree_of(S, dtype)
    item = ITEMSIZE[dtype]
    padded = power_above(N) << tree.log2_tiles
    across = -(-C // group)
    cuts: list[tuple[int, int, int, int]] = []
    for cluster in limits.clusters:
        span = padded // cluster
        run = group * min(S, span * TILE) * item
        slot = -(-(run + (0 if aligned else VECTOR_BYTES - item)) // VECTOR_BYTES) * VECTOR_BYTES
        slots_bytes = staged * max(span >> tree.log2_tiles, 1) * slot
        nodes = group * (span + (cluster if cluster > 1 else 0))
        shared = slots_bytes + nodes * NODE_BYTES + group * COEFFICIENTS_BYTES[acc_of(dtype)]
        if span and shared <= limits.shared_bytes and (not cuts or slots_bytes >= SPLIT_BYTES):
            cuts.append((cluster, span, slot, shared))
    if not cuts:
        return None

    # Enough blocks for the device; then two on a multiprocessor, so that one loads while the other stores.
    cluster, span, slot, shared = max(
        cuts, key=lambda cut: (min(across * cut[0], limits.multiprocessors), _fits_twice(cut[3], limits), -cut[0])
    )
    threads = THREADS if _fits_twice(shared, limits) or dtype == "float64" else 2 * THREADS
    rows = min(N, max(span >> tree.log2_tiles, 1)) * group  # of a block
    specialised = option(
        ELEMENT=ELEMENTS[dtype],
        THREADS=threads,
        CLUSTER=cluster,
        GROUPED=group > 1,
        ALIGNED=aligned and S % OCTET == 0,
        TILE_LANES=lanes_of(S, threads // rows),  # all threads, where they have octets
    )
    options_of_all = (*specialised, *tree.options, *flags(options))
    fields = tuple({**sizes(extents), **tree.fields, "span": span, "group": group, "slot": slot}.items())
    return Launch("slab", options_of_all, across * cluster, shared, fields, "", "nchw", threads, cluster)


def slab_channels(extents: Extents, operands: Operands, options: Options, limits: Limits) -> Launch | None:
    """The same where channels lie one after the other, and a slice of them fits."""
    torn = has_relu_mask(options) and extents.C % OCTET  # two rows have bits of the same byte
    if 0 in extents or torn or not all(goes_on(extents, o) for o in given(operands)):
        return None
    return _slab_channels(extents, operands.x.dtype, options, limits)


class _Slice(NamedTuple):
    """Channels of a cluster of blocks, and what each of these has of them."""

    width: int  # bytes
    across: int  # as many slices have all channels
    cluster: int
    span: int  # tiles
    slot: int  # bytes of x
    depth: int  # log2 of the columns of a lane, which has 8 bytes of each
    shared: int


def _slices(extents: Extents, dtype: str, staged: int, limits: Limits) -> Iterator[_Slice]:
    """Those that fit."""
    N, C, S = extents
    tree = tree_of(S, dtype)
    item = ITEMSIZE[dtype]
    wide = min(max(power_above(C), OCTET) * item, SLICES[-1])  # enough for all channels, or the widest
    least = min(max(OCTET * item, SLICES[1]), wide)
    for width, cluster in product(SLICES, limits.clusters):
        span = (power_above(N) << tree.log2_tiles) // cluster
        if not least <= width <= wide or not span:
            continue
        samples = span >> tree.log2_tiles
        rows = min(N, samples) * S if samples else min(S, span * TILE)
        slot = -(-rows // OCTET) * OCTET * width  # up to eight rows change places
        group = width // item
        depth = (width // WIDE_CHANNELS).bit_length() if S > 4 else 2  # nodes of more tiles would not fit registers
        pieces = span * power_above(min(S, COLUMNS)) * width // (WIDE_CHANNELS * WARP << depth)
        nodes = max(pieces, 1) + (cluster if cluster > 1 else 0)
        shared = staged * slot + group * (nodes * NODE_BYTES + COEFFICIENTS_BYTES[acc_of(dtype)])
        if shared <= limits.shared_bytes and (cluster == 1 or staged * slot >= SPLIT_BYTES):
            yield _Slice(width, -(-C // group), cluster, span, slot, depth, shared)


@functools.lru_cache(1024)
def _slab_channels(extents: Extents, dtype: str, options: Options, limits: Limits) -> Launch | None:
    staged = read_twice(options)
    found = list(_slices(extents, dtype, staged, limits))
    if not found:
        return None

    def merit(s: _Slice) -> tuple[int, bool, int, int]:
        """Enough blocks for the device; two on a multiprocessor; then wide slices, for the sake of memory."""
        return min(s.across * s.cluster, limits.multiprocessors), _fits_twice(s.shared, limits), s.width, -s.cluster

    best = max(found, key=merit)
    blocks = best.across * best.cluster
    if FEW_BLOCKS * blocks < limits.multiprocessors and staged * best.slot > LONE_BYTES:
        return None
    tree = tree_of(extents.S, dtype)
    threads = THREADS if _fits_twice(best.shared, limits) or dtype == "float64" else 2 * THREADS
    specialised = option(
        ELEMENT=ELEMENTS[dtype],
        THREADS=threads,
        CLUSTER=best.cluster,
        SLICE=best.width,
        TILE_ROWS=tree.rows_of_first,
        DEPTH=best.depth,
        TILE_DEPTH=power_above(min(extents.S, COLUMNS)).bit_length() - 1,
    )
    fields = {
        **sizes(extents),
        **tree.fields,
        "span": best.span,
        "group": best.width // ITEMSIZE[dtype],
        "slot": best.slot,
    }
    return Launch(
        "slab_channels",
        (*specialised, *flags(options)),
        blocks,
        best.shared,
        tuple(fields.items()),
        octets="nhwc",
        threads=threads,
        cluster=best.cluster,
    )
