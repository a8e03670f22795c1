"""How work is cut for CUDA: pure functions of extents, layout, alignment, dtype and the device's limits.

No result depends on what is chosen here. A plan says which kernel of `kernels/` runs, how it is specialised, on which
grid, and the parameters that follow from shapes alone; `backend.py` adds the addresses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import NamedTuple

import numpy as np

from cubn._tree import COLUMNS, TILE
from cubn.backends import Extents, Operand

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1}
ELEMENTS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}

THREADS = 256
WARP = 32
OCTET = 8  # elements a thread takes at a time
VECTOR_BYTES = 16
LEVELS = 8

NODE_BYTES = 16
COEFFICIENTS_BYTES = {"float": 32, "double": 48}  # of a channel, in shared memory
MOST_NODES = 1024  # of a block, in shared memory
WAVES = 4  # blocks per multiprocessor and more: enough to hide latency and even out the end
MERGED_ROWS = 256  # rows of nodes that one block merges
MERGED_BYTES = 40 << 10  # the shared memory it uses for that
WIDE_CHANNELS = 8  # bytes of neighbouring channels that a thread of reduce_channels owns
MOST_ROUNDS = 16  # of 256 columns in a block of reduce_channels
STEPS = 4  # rounds of an elementwise thread
NARROW_INDEX = 1 << 31  # elements from which 32 bits do not count them
CLUSTER_CAPABILITY = (9, 0)
CLUSTERS = (1, 2, 4, 8)  # blocks that share a slab; more than 8 are not portable
SPLIT_BYTES = 8 << 10  # of a block; splitting a slab further only costs
RESERVED_BYTES = 1 << 10  # of shared memory, in every block
NEIGHBOUR_BYTES = 512  # of a sample, from which a block needs no more channels
PEELED_BYTES = 1024  # from which elements before and after whole vectors no longer matter
SLICES = (16, 32, 64)  # bytes of neighbouring channels, of a block; memory moves no fewer than 32
LONE_BYTES = 64 << 10  # of a block, more than which takes longer than several launches where few blocks share them
FEW_BLOCKS = 4  # times which is still less than the multiprocessors

Fields = Mapping[str, int | float]


@dataclass(frozen=True)
class Limits:
    """What a device can do."""

    multiprocessors: int
    shared_bytes: int  # of a block that asks for it
    capability: tuple[int, int]


@dataclass(frozen=True)
class Launch:
    """One kernel launch but for the addresses."""

    kernel: str
    options: tuple[str, ...]
    grid: int
    shared_bytes: int
    fields: tuple[tuple[str, int | float], ...]
    file: str = ""  # kernels/<file>.cu, where it is not the kernel's own name
    octets: str = ""  # begin "rows", "channels" or nothing but the array ("linear")
    threads: int = THREADS
    cluster: int = 1

    @property
    def source(self) -> str:
        return self.file or self.kernel


def acc_of(dtype: str) -> str:
    """The C++ type that values of a dtype are widened to."""
    return "double" if dtype == "float64" else "float"


def power_above(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


def power_below(n: int) -> int:
    """The greatest power of two that is n or less."""
    return 1 << (n.bit_length() - 1)


def kind_of(extents: Extents, operands: Sequence[Operand]) -> str:
    """Which kernels can read and write all operands.

    "rows": neighbouring positions are neighbours in memory (nchw). "channels": neighbouring channels are, and positions
    go on with one step from sample to sample (nhwc, 2-D). "strided": anything else.
    """
    _, C, S = extents
    if S > 1 and all(o.position_strides == (1,) for o in operands):
        return "rows"
    if all((o.channel_stride == 1 or C == 1) and len(o.position_strides) <= 1 for o in operands):
        return "channels"
    return "strided"


def position_step(o: Operand) -> int:
    """Elements from one position to the next; with one position, from one sample to the next."""
    return o.position_strides[0] if o.position_strides else o.sample_stride


def elementwise_kind(extents: Extents, operands: Sequence[Operand]) -> str:
    """`kind_of`, for the elementwise kernels: octets stay within a row of positions or channels, or all are linear."""
    kind = kind_of(extents, operands)
    if kind == "channels" and not all(goes_on(extents, o) for o in operands):
        return "strided"
    whole = {"rows": extents.S, "channels": extents.C}.get(kind, 1) % OCTET == 0
    return kind if whole or all(is_linear(extents, o, kind) for o in operands) else "strided"


def is_linear(extents: Extents, o: Operand, kind: str) -> bool:
    """Whether the operand fills its memory in the order of its kind, (n, c, p) or (n, p, c)."""
    N, C, S = extents
    if kind == "rows":
        return (C == 1 or o.channel_stride == S) and (N == 1 or o.sample_stride == C * S)
    step = position_step(o)
    return (N * S == 1 or step == C) and goes_on(extents, o)


def goes_on(extents: Extents, o: Operand) -> bool:
    """Whether the step from one position to the next leads from a sample's last to the next sample's first as well."""
    return extents.N == 1 or extents.S == 1 or o.sample_stride == extents.S * position_step(o)


def octets_are_vectors(launch: Launch, o: Operand) -> bool:
    """Whether all octets that a kernel reads of an operand begin at multiples of 16 bytes."""
    steps = {"rows": (o.sample_stride, o.channel_stride), "channels": (position_step(o), o.sample_stride), "linear": ()}
    return are_vectors(o, steps[launch.octets])


def is_dense(launch: Launch, extents: Extents, operands: Sequence[Operand]) -> bool:
    """Whether all octets of all operands are vectors; and, but for the channels of a thread, all are in one order."""
    return all(
        octets_are_vectors(launch, o) and (launch.octets != "rows" or is_linear(extents, o, "rows")) for o in operands
    )


def are_vectors(o: Operand, steps: Sequence[int], size: int = VECTOR_BYTES) -> bool:
    """Whether addresses that start from the operand's and go on in these steps are multiples of `size` bytes."""
    item = ITEMSIZE[o.dtype]
    return not (o.pointer % size or any(step * item % size for step in steps))


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


def _sizes(extents: Extents) -> Fields:
    return {"samples": extents.N, "channels": extents.C, "positions": extents.S}


def option(**names: object) -> tuple[str, ...]:
    return tuple(f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in names.items())


@dataclass(frozen=True)
class Reduction:
    """A pass over x (and dy) that leaves rows of nodes, and the launches that merge them until `finish` can."""

    reduce: Launch
    rows: int
    merges: tuple[tuple[Launch, int], ...]  # with the rows each leaves


@functools.lru_cache(1024)
def reduction(extents: Extents, kind: str, what: str, gate: str, dtype: str, vector: int, limits: Limits) -> Reduction:
    """The reduction of a non-empty array. `vector`: channels that a thread of reduce_channels can read at a time."""
    tree = tree_of(extents.S, dtype)
    common = option(ELEMENT=ELEMENTS[dtype], KIND=what, GATE=f"GATE_{gate.upper()}")
    cut = _cut_channels if kind == "channels" else _cut_tiles
    reduce, rows = cut(extents, kind, common, tree, vector, limits)
    merges = []
    left = rows
    while left > MERGED_ROWS:
        merge = merge_rows(extents.C, what, left, MERGED_ROWS)
        left = -(-left // MERGED_ROWS)
        merges.append((merge, left))
    return Reduction(reduce, rows, tuple(merges))


def _span(tiles: int, across: int, least: int, most: int, limits: Limits) -> int:
    """Tiles of a row of nodes: as many as leave blocks enough for the device."""
    span = least
    while 2 * span <= most and span < tiles and -(-tiles // (2 * span)) * across >= WAVES * limits.multiprocessors:
        span *= 2
    return span


def _cut_tiles(
    extents: Extents, kind: str, common: tuple[str, ...], tree: Tree, vector: int, limits: Limits
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
    if kind == "rows":
        options += option(TILE_ROWS=1 if S <= COLUMNS else 8)
    else:
        shared += span * 8
    fields = {**_sizes(extents), **tree.fields, "span": span, "group": group, "blocks_across": across}
    octets = "rows" if kind == "rows" else ""
    return Launch(f"reduce_{kind}", options, rows * across, shared, tuple(fields.items()), octets=octets), rows


def _cut_channels(
    extents: Extents, kind: str, common: tuple[str, ...], tree: Tree, vector: int, limits: Limits
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
    fields = {**_sizes(extents), **tree.fields, "span": span, "group": group, "blocks_across": across}
    shared = group * (span // tiles_a_round) * NODE_BYTES
    return Launch("reduce_channels", options, rows * across, shared, tuple(fields.items()), octets="channels"), rows


def _merge_group(rows: int, C: int) -> int:
    return min(power_above(C), WARP, power_below(MERGED_BYTES // (rows * (NODE_BYTES + 8))))


@functools.lru_cache(1024)
def merge_rows(C: int, what: str, rows: int, merged: int) -> Launch:
    """Every `merged` rows into one."""
    group = _merge_group(merged, C)
    across = -(-C // group)
    shared = merged * (group * NODE_BYTES + 8)
    fields = {"channels": C, "from_rows": rows, "merged": merged, "group": group, "blocks_across": across}
    options = option(KIND=what, ACC="double", FINISH_MOMENTS=what == "Moments")
    return Launch("merge_rows", options, -(-rows // merged) * across, shared, tuple(fields.items()))


@functools.lru_cache(1024)
def finish(C: int, what: str, rows: int, dtype: str) -> Launch:
    """The last merge, and what follows from the root."""
    group = _merge_group(rows, C)
    options = option(KIND=what, ACC=acc_of(dtype), FINISH_MOMENTS=what == "Moments")
    fields = {"channels": C, "from_rows": rows, "group": group}
    shared = rows * (group * NODE_BYTES + 8)
    return Launch("finish", options, -(-C // group), shared, tuple(fields.items()), file="merge_rows")


@functools.lru_cache(1024)
def root(C: int, what: str, merges: tuple[int, ...]) -> Launch:
    """All nodes of a table into one; `merges` as from `_tree.stack_order`."""
    waiting = accumulate((1 - count for count in merges[:-1]), initial=0)
    shared = max(waiting) * WARP * (NODE_BYTES + 8)
    fields = {"channels": C, "table_rows": len(merges)}
    return Launch("root", option(KIND=what), -(-C // WARP), shared, tuple(fields.items()), threads=WARP)


@functools.lru_cache(1024)
def channelwise(kernel: str, C: int, dtype: str = "float32") -> Launch:
    """A kernel with a thread for every channel."""
    return Launch(kernel, option(ACC=acc_of(dtype)), -(-C // THREADS), 0, (("channels", C),), file="channelwise")


@functools.lru_cache(1024)
def elementwise(extents: Extents, kind: str, dtype: str, options: tuple[str, ...], limits: Limits) -> Launch:
    """Normalise or the input gradient, over an array that is not empty; `kind` as from `elementwise_kind`."""
    N, C, S = extents
    common = (*option(ELEMENT=ELEMENTS[dtype]), *options)
    if kind == "channels" and C % OCTET == 0:
        return _channels(extents, common, limits)
    if kind == "rows" and S % OCTET == 0:
        return _rows(extents, common, 0, limits)
    if kind != "strided":  # octets run over the ends of rows
        rows = extents if kind == "rows" else Extents(N * S, C, 1)
        return _rows(rows, common, 2 if rows.S >= OCTET else 1, limits)
    return Launch(
        "apply_strided", common, -(-math.prod(extents) // (OCTET * THREADS)), 0, tuple(_sizes(extents).items())
    )


def _steps(octets: int, limits: Limits) -> int:
    """Rounds of a thread: more than one where blocks are plenty."""
    return STEPS if octets > 2 * STEPS * WAVES * THREADS * limits.multiprocessors else 1


def _divisor(name: str, by: int, bits: int) -> Fields:
    """n // by, n < 2**bits, as the upper half of a product; see kernels/parameters.cuh."""
    if by == 1:
        return {f"{name}.shift": -1}
    shift = (by - 1).bit_length() - 1
    multiplier = -(-(1 << bits + shift + 1) // by)  # below 2**(bits + 1)
    return {f"{name}.multiplier": multiplier - (multiplier >> 63 << 64), f"{name}.shift": shift}


def _rows(extents: Extents, common: tuple[str, ...], crossing: int, limits: Limits) -> Launch:
    elements = math.prod(extents)
    octets = -(-elements // OCTET)
    steps = _steps(octets, limits)
    index = "unsigned" if elements < NARROW_INDEX else "size_t"
    options = (*common, *option(CROSSING=crossing, INDEX=index))
    grid = -(-octets // (steps * THREADS))
    bits = 31 if elements < NARROW_INDEX else 63
    divisors = {**_divisor("over_positions", extents.S, bits), **_divisor("over_channels", extents.C, bits)}
    fields = {**_sizes(extents), **divisors, "steps": steps}
    return Launch("apply_rows", options, grid, 0, tuple(fields.items()), octets="linear" if crossing else "rows")


def _channels(extents: Extents, common: tuple[str, ...], limits: Limits) -> Launch:
    N, C, S = extents
    lanes = min(WARP, power_above(C // OCTET))
    across = -(-C // (OCTET * lanes))
    at_once = THREADS // lanes
    rounds = -(-N * S // at_once)
    steps = 1
    while steps < 16 and -(-rounds // (2 * steps)) * across >= 2 * WAVES * limits.multiprocessors:
        steps *= 2
    fields = {**_sizes(extents), "lanes": lanes, "steps": steps, "blocks_across": across}
    return Launch("apply_channels", common, -(-rounds // steps) * across, 0, tuple(fields.items()), octets="channels")


def vector_of(extents: Extents, operands: Sequence[Operand]) -> int:
    """How many neighbouring channels a thread of reduce_channels reads at a time."""
    vector = max(1, WIDE_CHANNELS // ITEMSIZE[operands[0].dtype])
    while vector > 1 and not (
        extents.C % vector == 0
        and all(are_vectors(o, (o.sample_stride, position_step(o)), vector * ITEMSIZE[o.dtype]) for o in operands)
    ):
        vector //= 2
    return vector


def slab(
    extents: Extents,
    operands: Mapping[str, Operand],
    staged: int,
    options: tuple[str, ...],
    keep_bits: bool,
    limits: Limits,
) -> Launch | None:
    """One kernel for a whole training step or gradient, where a channel's x (and dy: `staged` is 2) fits on chip."""
    N, C, S = extents
    if 0 in extents or kind_of(extents, tuple(operands.values())) != "rows":
        return None
    dtype = operands["x"].dtype
    neighbours = all(o.channel_stride == S for o in operands.values())
    group = _slab_group(extents, ITEMSIZE[dtype], neighbours, keep_bits)
    torn = (group * S % OCTET and group < C) or (C * S % OCTET and N > 1)
    if keep_bits and torn:  # two blocks would write the same byte
        return None
    kept = [operands[name] for name in ("x", "g")[:staged]]
    aligned = all(are_vectors(o, (o.sample_stride, group * o.channel_stride)) for o in kept)
    return _slab(extents, dtype, group, aligned, staged, options, limits)


def _slab_group(extents: Extents, item: int, neighbours: bool, keep_bits: bool) -> int:
    """Channels of a block: several where a sample has few positions, or vectors (or bytes of bits) would be torn."""
    _, C, S = extents
    group = 1
    while neighbours and group < C and S <= TILE:
        run = group * S * item
        torn = run % VECTOR_BYTES and run < PEELED_BYTES
        if run >= NEIGHBOUR_BYTES and not torn and not (keep_bits and group * S % OCTET):
            break
        group = min(2 * group, C)
    return group


def _fits_twice(shared: int, limits: Limits) -> bool:
    """Whether a multiprocessor has room for two blocks."""
    return 2 * (shared + RESERVED_BYTES) <= limits.shared_bytes + RESERVED_BYTES


@functools.lru_cache(1024)
def _slab(
    extents: Extents, dtype: str, group: int, aligned: bool, staged: int, options: tuple[str, ...], limits: Limits
) -> Launch | None:
    N, C, S = extents
    tree = tree_of(S, dtype)
    item = ITEMSIZE[dtype]
    padded = power_above(N) << tree.log2_tiles
    across = -(-C // group)
    cuts: list[tuple[int, int, int, int]] = []
    for cluster in CLUSTERS if limits.capability >= CLUSTER_CAPABILITY else (1,):
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
    lanes = WARP if S > COLUMNS else 1 if rows >= WARP else power_above(-(-S // OCTET))
    specialised = option(
        ELEMENT=ELEMENTS[dtype],
        THREADS=threads,
        CLUSTER=cluster,
        GROUPED=group > 1,
        TILE_LANES=lanes,
        TILE_ROWS=1 if S <= COLUMNS else 8,
    )
    fields = tuple({**_sizes(extents), **tree.fields, "span": span, "group": group, "slot": slot}.items())
    return Launch("slab", (*specialised, *options), across * cluster, shared, fields, "", "rows", threads, cluster)


def slab_channels(
    extents: Extents,
    operands: Mapping[str, Operand],
    staged: int,
    options: tuple[str, ...],
    bits: bool,
    limits: Limits,
) -> Launch | None:
    """The same where channels lie one after the other, and a slice of them fits; `bits`: some are read or written."""
    torn = bits and extents.C % OCTET  # two rows have bits of the same byte
    if 0 in extents or torn or not all(goes_on(extents, o) for o in operands.values()):
        return None
    return _slab_channels(extents, operands["x"].dtype, staged, options, limits)


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
    clusters = CLUSTERS if limits.capability >= CLUSTER_CAPABILITY else (1,)
    wide = min(max(power_above(C), OCTET) * item, SLICES[-1])  # enough for all channels, or the widest
    least = min(max(OCTET * item, SLICES[1]), wide)
    for width, cluster in product(SLICES, clusters):
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
def _slab_channels(
    extents: Extents, dtype: str, staged: int, options: tuple[str, ...], limits: Limits
) -> Launch | None:
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
        TILE_ROWS=1 if extents.S <= COLUMNS else 8,
        DEPTH=best.depth,
        TILE_DEPTH=power_above(min(extents.S, COLUMNS)).bit_length() - 1,
    )
    fields = {
        **_sizes(extents),
        **tree.fields,
        "span": best.span,
        "group": best.width // ITEMSIZE[dtype],
        "slot": best.slot,
    }
    return Launch(
        "slab_channels",
        (*specialised, *options),
        blocks,
        best.shared,
        tuple(fields.items()),
        octets="channels",
        threads=threads,
        cluster=best.cluster,
    )
