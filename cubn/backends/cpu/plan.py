"""How work is cut for the CPU: pure functions of extents, layout and dtype. No result depends on what is chosen
here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cubn._floating_point import default_floating_point
from cubn._kept import kept
from cubn._tree import COLUMNS, TILE, Block, Step, aligned_blocks, pair_order, root_order
from cubn._types import Extents, Operand, Operands
from cubn.backends.cpu.caches import last_level

LANES = 16
NODE = 256  # bytes of a node slot: two vectors of 16 float64
# What follows was chosen for the speed of kernels. Where no measurement is named, it is to be measured.
SHORT = 64  # positions up to which 16 channels are treated as one row
SPREAD_ROW = (SHORT + 1) * LANES * 8
SPREAD = 6 * SPREAD_ROW  # bytes of such a row's coefficient table

TASKS = 32  # enough to keep a few threads evenly busy, few enough that a node a task is nothing
WIDEST = 512  # channels side by side: long enough for memory to stream, short enough for the counters to stay in cache
NARROWEST = 128  # what they are cut to where there are few rows
LEAST_A_ROW = 256  # values of a channel: rows are merged by one thread, at 10 to 20 % of the time with 64 (512@7²)
SAMPLES_A_ROW = 256
VALUES_A_ROW = 1 << 16  # of 2-D arrays
RUNS = LANES * LANES  # samples that a narrow array is taken by
SERIAL_BYTES = 1 << 18  # below this waking a thread, some microseconds, costs more than it saves
LAST_CACHE = last_level()
STREAM_BYTES = LAST_CACHE.nbytes // 4  # of x, for each last cache in use: above, y only pushes other data out of it
SHARING = LAST_CACHE.processors
BLOCK_BYTES = 1 << 16
RELAID_EDGE = 64  # channels, and positions, of a block that is copied from layout to layout
FEW_CHANNELS = 128  # up to which several positions of a dense nhwc array are taken as one row
FEW_POSITIONS = 31  # up to which several channels of a dense nchw array are, where there are many samples
FEW_SAMPLES = 16
MOST_ENTRIES = 1 << 14
PERIOD = 512  # elements of such a row, unless there are more entries: its coefficients take a third of the first cache
SLAB_BYTES = 1 << 19  # of x that a fused task may take: half of a core's cache or less
STRETCH_BYTES = 1 << 13  # of a sample that a fused task should take at once, for memory to stream
WIDEST_SLAB = 8  # node slots

KEPT_BYTES = 8 << 20  # of the results of one function


Layout = Literal["nchw", "nhwc", "strided"]
WordLayout = Literal["nchw", "nhwc"]
"""Of a relu mask: whether a word's elements are neighbours along positions or along channels."""

Reading = Literal["nchw_long", "nchw_short", "nhwc", "nhwc_2d", "nhwc_narrow", "strided"]
"""How a reduction goes over an array: its layout, and what its extents make of that."""


def layout_of(extents: Extents, operands: Operands, relu_mask: WordLayout | None = None) -> Layout:
    """What all operands have in common, and a relu mask that is to be read.

    "nchw": neighbouring positions are neighbours in memory. "nhwc", to which 2-D belongs: neighbouring channels are,
    and positions go on with one step. "strided": anything else, and whatever comes with a mask.
    """
    layout = _common(extents, operands)
    return layout if relu_mask in (None, word_layout(layout)) else "strided"


def _common(extents: Extents, operands: Operands) -> Layout:
    _, C, S = extents
    if operands.mask:
        return "strided"
    if S > 1 and all(o.position_strides == (1,) for o in given(operands)):
        return "nchw"
    if all((o.channel_stride == 1 or C == 1) and len(o.position_strides) <= 1 for o in given(operands)):
        return "nhwc"
    return "strided"


def word_layout(layout: Layout) -> WordLayout:
    """In which kernels write a relu mask."""
    return "nhwc" if layout == "nhwc" else "nchw"


def given(operands: Operands) -> list[Operand]:
    """Those that are there."""
    return [operand for operand in operands if operand]


def reading_of(extents: Extents, operands: Operands, layout: Layout) -> Reading:
    """Long and short rows of positions; 2-D arrays, and those of them with too few channels for a vector."""
    if layout == "nchw":
        return "nchw_long" if extents.S >= COLUMNS else "nchw_short"
    if layout == "nhwc" and extents.S == 1:
        return "nhwc_narrow" if extents.C < LANES and flat_entries(extents, operands, layout) else "nhwc_2d"
    return layout


@dataclass(frozen=True)
class ReductionPlan:
    """How the tree is cut into node rows, and how these are merged.

    Row i covers samples [table[i, 0], table[i, 1]) of the array and tiles [table[i, 2], table[i, 3]) of each; a row is
    many samples or a part of one. `steps` merge rows of one sample, then complete pairs; rows `kept` then hold
    `blocks`. `to_root` are those steps and the ones that follow, if the array is the whole batch: row 0 then holds the
    root.
    """

    table: NDArray[np.int64]
    chunk: int
    chunks: int
    steps: NDArray[np.int64]
    to_root: NDArray[np.int64]
    kept: tuple[int, ...]
    blocks: tuple[Block, ...]
    offsets: tuple[int, ...]
    scratch: int

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.steps.nbytes + self.to_root.nbytes


@dataclass(frozen=True)
class SlabPlan:
    """How a fused kernel takes channels."""

    chunk: int
    tasks: int
    offsets: tuple[int, ...]
    scratch: int


def table_of(steps: Sequence[Step]) -> NDArray[np.int64]:
    """Merges, as kernels read them."""
    return np.array(steps, np.int64).reshape(-1, 2)


def scratch_offsets(width: int, tiles: int, samples: int, spread: int = 0) -> tuple[tuple[int, ...], int]:
    """Where a worker keeps what (at_pivot, ..., at_spread; see parameters.py), and bytes in all."""
    sizes = (
        max(width, 6) * LANES * 8,
        2304,
        9 * width * NODE,
        4608,
        width * NODE,
        (tiles.bit_length() + 1) * width * NODE,
        (samples.bit_length() + 1) * width * NODE,
        spread,
    )
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += size
    return tuple(offsets), -(-at // 64) * 64


@kept(KEPT_BYTES)
def reduction(extents: Extents, reading: Reading, start: int) -> ReductionPlan:
    """The rows of a reduction over samples [start, start + N)."""
    N, C, S = extents
    slot = 1 if reading == "nchw_long" else LANES
    chunk = slot
    if reading.startswith("nhwc"):
        chunk = min(C, WIDEST)
        while chunk >= 2 * NARROWEST and -(-C // chunk) * (N * S // LEAST_A_ROW) < TASKS // 2:
            chunk = -(-chunk // (2 * LANES)) * LANES
    if reading.startswith("nchw"):
        while chunk < 8 * slot and 4 * chunk * S < STRETCH_BYTES:
            chunk *= 2
    chunks = -(-C // chunk)
    tiles = -(-S // TILE)
    longest, part = _row_extent(extents, chunks, tiles, reading)
    samples = []
    for lo, hi in aligned_blocks(start, start + N):
        samples += [(a, min(a + longest, hi)) for a in range(lo, hi, longest)]
    table: list[tuple[int, int, int, int]] = []
    steps: list[Step] = []
    first_rows = []
    for lo, hi in samples:
        parts = [(a, min(a + part, tiles)) for a in range(0, tiles, part)]
        first_rows.append(len(table))
        steps += [(len(table) + a, len(table) + b) for a, b in root_order(parts)]
        table += [(lo - start, hi - start, *tile_range) for tile_range in parts]
    pairs, kept, blocks = pair_order(samples)
    steps += [(first_rows[a], first_rows[b]) for a, b in pairs]
    rows = [first_rows[i] for i in kept]
    to_root = (*steps, *((rows[a], rows[b]) for a, b in root_order(blocks)))
    spread = 2 * 8 * RUNS * C if reading == "nhwc_narrow" else 0
    offsets, scratch = scratch_offsets(-(-chunk // slot), part, longest, spread)
    return ReductionPlan(
        np.array(table, np.int64).reshape(-1, 4),
        chunk,
        chunks,
        table_of(steps),
        table_of(to_root),
        tuple(rows),
        blocks,
        offsets,
        scratch,
    )


def _row_extent(extents: Extents, chunks: int, tiles: int, reading: Reading) -> tuple[int, int]:
    """(samples a row at most, tiles a row): powers of two that leave about TASKS tasks, or fewer of LEAST_A_ROW
    values.
    """
    N, C, S = extents
    wanted = max(1, min(TASKS // chunks, N * S // LEAST_A_ROW))
    if wanted <= N:
        samples, most = 1, max(SAMPLES_A_ROW, VALUES_A_ROW // C if S == 1 else 0)
        while samples < most and N // (2 * samples) >= wanted:
            samples *= 2
        return max(samples, {"nhwc_2d": LANES, "nhwc_narrow": RUNS}.get(reading, 1)), tiles
    part = 1
    while tiles // (2 * part) * N >= wanted:
        part *= 2
    return 1, part


@functools.lru_cache(1024)
def slab(extents: Extents, reading: Reading, itemsize: int, threads: int) -> SlabPlan | None:
    """How channels are cut where statistics and the elementwise pass of a channel are one task; None where that
    cannot be.
    """
    N, C, S = extents
    if not reading.startswith("nchw"):
        return None
    one = 1 if reading == "nchw_long" else LANES  # channels of a node slot
    chunk = one
    while (
        chunk < one * WIDEST_SLAB
        and 2 * chunk * N * S * itemsize <= SLAB_BYTES
        and chunk * S * itemsize < STRETCH_BYTES
    ):
        chunk *= 2
    while chunk > one and -(-C // chunk) < 8 * threads:
        chunk //= 2
    tasks = -(-C // chunk)
    if threads > 1 and tasks < 4 * threads and tasks % threads:
        return None
    width = chunk // one
    offsets, scratch = scratch_offsets(width, -(-S // TILE), N, SPREAD if reading == "nchw_short" else 0)
    return SlabPlan(chunk, tasks, offsets, scratch)


@kept(KEPT_BYTES)
@default_floating_point
def column_table(length: int, double: bool) -> NDArray[np.floating]:
    """Shares and weights of the merges of the columns of a tile of `length` positions.

    For each level, 16 pairs at a time: 16 shares, then 16 weights, in acc.
    """
    acc: type[np.floating] = np.float64 if double else np.float32
    counts = np.array([len(range(j, length, COLUMNS)) for j in range(min(length, COLUMNS))], acc)
    table = [np.zeros((0, 2, LANES), acc)]
    while len(counts) > 1:
        pairs = len(counts) // 2
        a, b = counts[: 2 * pairs : 2], counts[1 : 2 * pairs : 2]
        share = b / (a + b)
        level = np.zeros((2, -(-pairs // LANES) * LANES), acc)
        level[0, :pairs], level[1, :pairs] = share, a * share
        table.append(level.reshape(2, -1, LANES).transpose(1, 0, 2))
        counts = np.append(a + b, counts[2 * pairs :])
    return np.ascontiguousarray(np.concatenate(table))


def elementwise_tasks(extents: Extents, layout: Layout, itemsize: int) -> tuple[int, int]:
    """(tasks, rows a task) of an elementwise pass; a strided one takes 16 channels of a sample."""
    N, C, S = extents
    if layout == "strided":
        return N * -(-C // LANES), 0
    rows, length = (N * C, S) if layout == "nchw" else (N * S, C)
    block = max(1, BLOCK_BYTES // (length * itemsize))
    return -(-rows // block), block


def flat_entries(extents: Extents, operands: Operands, layout: Layout) -> int | None:
    """After how many elements coefficients repeat, where an elementwise pass takes dense arrays as one long row: nhwc
    ones of few channels, nchw ones of few positions; None where it does not.
    """
    N, C, S = extents
    if layout == "nhwc":
        few, strides = C <= FEW_CHANNELS, [(o.sample_stride, *(o.position_strides or (C,))) for o in given(operands)]
        return C if few and all(those == (S * C, C) for those in strides) else None
    few = S <= FEW_POSITIONS and C * S <= MOST_ENTRIES and N >= FEW_SAMPLES
    dense = all((o.sample_stride, o.channel_stride) == (C * S, S) for o in given(operands))
    return C * S if layout == "nchw" and few and dense else None


def flat_tasks(extents: Extents, entries: int, itemsize: int) -> tuple[int, int, int]:
    """(tasks, elements a task, period of the table) of an elementwise pass over arrays taken as one long row."""
    period = max(1, PERIOD // entries) * entries
    block = max(1, BLOCK_BYTES // (period * itemsize)) * period
    return -(-math.prod(extents) // block), block, period


def relaid_tasks(extents: Extents, itemsize: int) -> tuple[int, int]:
    """(tasks, blocks a task) of a copy from layout to layout."""
    N, C, S = extents
    edge = RELAID_EDGE
    blocks = N * max(C // edge, 1) * max(S // edge, 1)
    many = max(1, BLOCK_BYTES // (min(C, edge) * min(S, edge) * itemsize))
    return -(-blocks // many), many


def streams(extents: Extents, itemsize: int, threads: int) -> bool:
    """Whether outputs should bypass the caches."""
    return math.prod(extents) * itemsize >= -(-threads // SHARING) * STREAM_BYTES


def threads_for(size: int, tasks: int, limit: int) -> int:
    """How many threads an array of `size` bytes is worth."""
    return 1 if size < SERIAL_BYTES else max(1, min(limit, tasks))
