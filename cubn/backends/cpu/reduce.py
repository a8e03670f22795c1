"""The canonical tree over samples and tiles, whatever reads a tile."""

from __future__ import annotations

from typing import Any

from cubn.backends.cpu.nchw_long import of_columns
from cubn.backends.cpu.nchw_short import of_rows
from cubn.backends.cpu.nhwc import of_channels
from cubn.backends.cpu.nhwc_2d import of_single_positions
from cubn.backends.cpu.nodes import (
    AT_COUNTS,
    AT_NODE,
    AT_SAMPLES,
    AT_TILES,
    G_POSITION,
    G_SAMPLE,
    POSITIONS,
    RELU_MASK_POSITION,
    RELU_MASK_SAMPLE,
    TILE,
    X_POSITION,
    X_SAMPLE,
    Source,
    counter,
    jit,
)
from cubn.backends.cpu.plan import NODE, Reading
from cubn.backends.cpu.simd import (
    LANES,
    Element,
    get,
    moved,
    put,
)
from cubn.backends.cpu.strided import of_any


def channels_of_a_slot(reading: Reading) -> int:
    """How many channels one node slot holds."""
    return 1 if reading == "nchw_long" else LANES


def gather(source: Source, reading: Reading) -> Any:
    """For kernels: the nodes of `width` slots of channels from c0 over samples [first, last) and tiles [from,
    to) of each.

    It returns the address of `width` float64 node slots and leaves their count at `work + AT_COUNTS + 2048`. `first`
    and `from` are aligned to the tree (see rows in plan.py), so that the counters start at 0.
    """
    push, count_up, settle = counter(Element("float64"), source.what)

    if reading in ("nhwc_2d", "nhwc_narrow"):
        samples = of_single_positions(source, reading == "nhwc_narrow")

        @jit
        def collect_single(p, work, at, first, last, tile_from, tile_to, c0, width):  # type: ignore[no-untyped-def]
            root, count = samples(p, work, at, first, last, c0, width)
            put(work + get(p + AT_COUNTS) + 2048, count)
            return root

        return collect_single

    if reading == "strided":
        tile = of_any(source)
    else:
        tile = {"nhwc": of_channels, "nchw_short": of_rows, "nchw_long": of_columns}[reading](source)

    nchw, strided = reading.startswith("nchw"), reading == "strided"  # strided arrays find positions by their tables

    @jit
    def collect(p, work, at, first, last, tile_from, tile_to, c0, width):  # type: ignore[no-untyped-def]
        positions = get(p + POSITIONS)
        tiles, samples, node = work + get(p + AT_TILES), work + get(p + AT_SAMPLES), work + get(p + AT_NODE)
        tile_counts, sample_counts = work + get(p + AT_COUNTS) + 512, work + get(p + AT_COUNTS) + 1024
        by_sample = get(p + X_SAMPLE), get(p + G_SAMPLE), get(p + RELU_MASK_SAMPLE)
        by_tile = TILE * get(p + X_POSITION), TILE * get(p + G_POSITION), TILE * get(p + RELU_MASK_POSITION)
        if nchw:
            by_tile = by_tile[0], by_tile[1], TILE // 8
        if strided:
            by_tile = 0, 0, 0
        whole = tile_to - tile_from == 1
        for n in range(first, last):
            sample = moved(at, by_sample, n)
            for t in range(tile_from, tile_to):
                following = moved(sample, by_tile, t + 1)
                if t + 1 == tile_to:
                    following = moved(moved(sample, by_sample, 1), by_tile, tile_from)
                length = min(positions - t * TILE, TILE)
                count = tile(p, work, moved(sample, by_tile, t), n, t, length, c0, width, node, following)
                stack, counts, index = tiles, tile_counts, t - tile_from
                if whole:  # a sample of one tile is that tile
                    stack, counts, index = samples, sample_counts, n - first
                for lane in range(width):
                    push(node + lane * NODE, count, stack, counts, width, lane, 0, index)
                count_up(count, counts, 0, index)
            if not whole:
                level = settle(tiles, tile_counts, width, tile_to - tile_from)
                count = get(tile_counts + 8 * level)
                for lane in range(width):
                    push(
                        tiles + (level * width + lane) * NODE, count, samples, sample_counts, width, lane, 0, n - first
                    )
                count_up(count, sample_counts, 0, n - first)
        level = settle(samples, sample_counts, width, last - first)
        put(work + get(p + AT_COUNTS) + 2048, get(sample_counts + 8 * level))
        return samples + level * width * NODE

    return collect
