"""The resident path: one kernel for a training step, one for its gradient, with the bits of the oracle."""

import itertools
import re

import numpy as np
import pytest

from cubn._types import Extents, NormalizeOptions, Operand, Operands
from cubn.backends.cuda import plan
from cubn.backends.cuda.plan import Limits, resident
from tests.cuda import specialisations, steps
from tests.cuda.steps import DTYPES, Case, clusters, random, train_and_back
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.runner import Order, shuffled

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

SHORT = (3, 11, 49)  # a sample's positions are no whole vectors, and the last group of channels is short
MANY = (9, 11, 49)  # rows enough for a thread each
TILES = (3, 2, 4500)  # three tiles a sample, the last one short


@pytest.mark.every_value
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("extents", "options"),
    [
        (SHORT, {"relu": True}),
        (MANY, {"relu": True}),
        ((9, 16, 49), {"residual": True, "relu": True}),
        ((2, 3, 264), {"frozen": True, "residual": True}),
        (TILES, {"relu": True}),
    ],
    ids=["short rows", "many short rows", "many short rows with bits", "rows, frozen", "tiles"],
)
def test_every_dtype_gives_the_oracle_s_bits(dtype, extents, options):
    different, *launched = train_and_back(Case(extents, dtype, 227, **options))
    assert different == []
    clusters("slab", *launched)


@pytest.mark.parametrize("S", [2, 8, 9, 15, 16, 17, 23, 24, 49, 64, 65, 100, 127, 129, 196, 225, 248, 255, 256])
@pytest.mark.parametrize("N", [150, 33, 3])
def test_lanes_of_a_row_give_the_oracle_s_bits(N, S):
    different, *launched = train_and_back(Case((N, 1, S), "float16", 227, relu=True))
    assert different == []
    clusters("slab", *launched)
    for (launch,) in launched:
        lanes = int(re.search(r"-DTILE_LANES=(\d+)", " ".join(launch.options))[1])
        samples = min(N, dict(launch.fields)["span"])
        assert 8 * lanes < 2 * S or lanes == 1  # none has nothing to do
        assert lanes == 1 or samples * lanes <= launch.threads
        assert 8 * lanes >= S or 2 * samples * lanes > launch.threads


def last_rows(*launched):
    """What is told the compiler of the tiles' rows: TILE_ROWS, TALL, ALIGNED."""
    names = ("TILE_ROWS", "TALL", "ALIGNED")
    return {
        tuple(int(value) for name in names for value in re.findall(rf"-D{name}=(\d)", " ".join(launch.options)))
        for (launch,) in launched
    }


@pytest.mark.every_value
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("S", "rows"),
    [
        *((256 * rows - less, (rows, 0, less % 8 == 0)) for rows in range(2, 8) for less in (0, 8, 240, 255)),
        (2047, (8, 0, 0)),
        (2040, (8, 0, 1)),
        (2048, (0, 1, 1)),
        (2049, (1, 1, 0)),
        (2048 + 256, (1, 1, 1)),
        *((4096 - less, (8, 1, less % 8 == 0)) for less in (16, 99)),
        *((2048 + 256 * rows - less, (rows, 1, less % 8 == 0)) for rows in range(2, 8) for less in (0, 48, 77)),
    ],
)
def test_tiles_of_any_rows_give_the_oracle_s_bits(S, rows, dtype):
    different, *launched = train_and_back(Case((3, 2, S), dtype, 227, residual=True))
    assert different == []
    assert last_rows(*launched) == {rows}


@pytest.mark.parametrize("S", [300, 304])
def test_an_infinity_in_a_column_of_one_value_gives_the_oracle_s_bits(S, monkeypatch):
    def infinite(rng, case):
        values = random(rng, case)
        values[0, 0, 255] = np.inf  # the second row ends before
        return values

    monkeypatch.setattr(steps, "random", infinite)
    different, *launched = train_and_back(Case((2, 1, S)))
    assert different == []
    assert last_rows(*launched) == {(2, 0, S % 8 == 0)}


@pytest.mark.every_value
@pytest.mark.parametrize(
    ("case", "step", "gradient"),
    [
        (Case((9, 3, 600), kilobytes=14), (4, 1), (8, 1)),  # blocks of 4, 4, 1, 0 samples; of 2
        (Case((5, 24, 49), "bfloat16", 3, residual=True, relu=True), (4, 8), (8, 8)),
        (Case(TILES, kilobytes=34), (8, 1), (8, 1)),  # blocks of two of a sample's three tiles, of one, of none
        (Case((1, 2, 16000), "bfloat16", 9, residual=True, relu=True), (4, 1), (8, 1)),
        (Case((4, 1, 2100), kilobytes=227, multiprocessors=2), (2, 1), (2, 1)),  # not needed, but there is room
    ],
    ids=lambda value: "" if isinstance(value, tuple) and len(value) == 2 else None,
)
@pytest.mark.parametrize("order", [Order.ASCENDING, Order.REVERSED, shuffled(3)])
def test_a_cluster_gives_the_oracle_s_bits_in_any_order(case, step, gradient, order):
    different, *launched = train_and_back(case._replace(order=order))
    assert different == []
    assert clusters("slab", *launched) == (step, gradient)


@pytest.mark.every_pair
@pytest.mark.parametrize(
    ("extents", "options"),
    [(SHORT, {}), (MANY, {}), (SHORT, {"gap": 3}), ((2, 3, 300), {}), ((2, 3, 264), {"relu": True})],
    ids=["short rows", "many short rows", "short rows apart", "rows", "rows with bits"],
)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("offset", range(8))
def test_every_alignment_gives_the_oracle_s_bits(extents, options, in_place, offset):
    offsets = (offset, (3 * offset + 1) % 8, (5 * offset + 2) % 8, (7 * offset + 4) % 8)
    case = Case(extents, "bfloat16", residual=True, offsets=offsets, in_place=in_place, **options)
    different, *launched = train_and_back(case)
    assert different == []
    clusters("slab", *launched)


def slab(extents, *, kilobytes=227, capability=(9, 0), keep_mask=False, gap=0, multiprocessors=1, dtype="float32"):
    """What is planned for a training step."""
    _, C, S = extents
    o = Operand(0, dtype, C * (S + gap), S + gap, (S,), (1,))
    limits = Limits(multiprocessors, kilobytes << 10, capability)
    return plan.on_chip(Extents(*extents), Operands(o, y=o), None, NormalizeOptions(False, False, keep_mask), limits)


def test_what_does_not_fit_is_not_resident():
    assert slab((32, 64, 56 * 56)).cluster == 4
    assert slab((32, 64, 56 * 56), capability=(8, 0)) is None  # there are no clusters
    assert slab((8, 64, 56 * 56), capability=(8, 0)).cluster == 1
    assert slab((512, 64, 56 * 56)) is None
    assert slab((0, 3, 49)) is None
    assert slab((4, 3, 1)).kernel == "slab_channels"


def test_blocks_share_no_byte_of_a_relu_mask():
    assert slab((2, 16, 49), keep_mask=True)
    assert slab((2, 12, 49), keep_mask=True) is None  # a sample ends within a byte
    assert slab((1, 12, 49), keep_mask=True)
    assert slab((2, 8, 2049), keep_mask=True) is None  # so does a channel that is a group
    assert slab((2, 16, 49), gap=1, keep_mask=True) is None


@pytest.mark.parametrize(
    ("extents", "blocks"),
    [
        ((32, 1024, 196), 256),  # and not 512 of half as many channels, of which a multiprocessor has no four at a time
        ((32, 512, 784), 256),
        ((32, 1023, 196), 256),
        ((32, 512, 196), 256),  # which have one turn
        ((256, 1024, 196), 1024),  # twice as many would not fit
    ],
)
def test_blocks_have_one_turn_where_they_can(extents, blocks):
    assert slab(extents, multiprocessors=132, dtype="bfloat16").grid == blocks


def test_no_multiprocessor_has_more_to_do_for_the_sake_of_one_turn():
    assert slab((32, 512, 196), multiprocessors=108, kilobytes=163, capability=(8, 0), dtype="bfloat16").grid == 256


@pytest.mark.parametrize(
    ("extents", "kilobytes", "capability", "group", "cluster"),
    [
        ((32, 1024, 196), 227, (9, 0), 4, 1),
        ((32, 256, 196), 227, (9, 0), 2, 2),
        ((256, 1024, 196), 227, (9, 0), 2, 4),
        ((32, 1024, 196), 99, (8, 9), 1, 1),  # of two, a multiprocessor would have one block at a time
        ((32, 128, 196), 163, (8, 0), 1, 1),  # and of these no two
    ],
)
def test_octets_are_whole_where_no_multiprocessor_has_too_few_blocks(extents, kilobytes, capability, group, cluster):
    launch = slab(extents, multiprocessors=132, kilobytes=kilobytes, capability=capability)
    assert (dict(launch.fields)["group"], launch.cluster) == (group, cluster)


def test_channels_apart_have_turns():
    assert slab((32, 1024, 784), multiprocessors=132, dtype="bfloat16", gap=8).grid == 1024


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_every_channel_of_a_block_has_a_thread_that_finishes_it(dtype, multiprocessors):
    limits = Limits(multiprocessors, 227 << 10, (9, 0))
    for C, S in itertools.product((96, 255, 512, 1000, 1024, 4096), (2, 3, 4, 5, 8, 49)):
        extents = Extents(8, C, S)
        x = specialisations.Layout("nchw").operand(extents, dtype)
        launch = resident.slab(extents, Operands(x, None, x), NormalizeOptions(False, False, False), limits)
        assert dict(launch.fields)["group"] <= launch.threads
