"""The resident path where channels lie one after the other: one kernel for a step, one for its gradient."""

import pytest

from cubn._types import Extents, GradientOptions, NormalizeOptions, Operand, Operands
from cubn.backends.cuda import plan
from cubn.backends.cuda.plan import Limits
from tests.cuda.steps import DTYPES, Case, clusters, train_and_back
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.runner import Order, shuffled

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

LIMITS = {"kilobytes": 227, "channels_last": True}


def check(case):
    different, *launched = train_and_back(case)
    assert different == []
    return clusters("slab_channels", *launched)


@pytest.mark.every_value
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("extents", "options"),
    [
        ((70, 24, 1), {"relu": True}),
        ((33, 40, 1), {"residual": True, "relu": True}),
        ((5, 11, 3), {}),
        ((3, 24, 49), {"residual": True, "relu": True}),
        ((2, 16, 264), {"frozen": True, "residual": True}),
        ((2, 5, 264), {"frozen": True, "relu": True}),
    ],
    ids=["2-d", "2-d with bits", "few positions", "bits", "rows, frozen", "part of an octet, frozen"],
)
def test_every_dtype_gives_the_oracle_s_bits(dtype, extents, options):
    check(Case(extents, dtype, **LIMITS, **options))


@pytest.mark.parametrize("dtype", DTYPES[:3])  # of float64, two tiles fit nowhere
def test_several_tiles_give_the_oracle_s_bits(dtype):
    check(Case((2, 8, 4500), dtype, **LIMITS, relu=True, multiprocessors=16))


@pytest.mark.every_value
@pytest.mark.parametrize("C", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_channels_on_both_sides_of_slices(C, dtype):
    check(Case((6, C, 9), dtype, **LIMITS, gap=1 if C == 1 else 0, relu=True))


@pytest.mark.every_value
@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65, 127, 300])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_samples_of_one_value(N, dtype):
    check(Case((N, 24, 1), dtype, **LIMITS, order=Order.REVERSED))


@pytest.mark.every_value
@pytest.mark.parametrize(
    "S", [2, 3, 4, 5, 7, 8, 15, 16, 17, 32, 33, 63, 64, 65, 128, 129, 255, 256, 257, 511, 2047, 2048, 2049]
)
@pytest.mark.parametrize("N", [1, 2, 3])
def test_positions_on_both_sides_of_pieces_and_tiles(N, S):
    check(Case((N, 8, S), "bfloat16", **LIMITS, order=shuffled(S)))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(
    ("S", "rows"),
    [*((256 * rows - less, rows) for rows in range(2, 8) for less in (0, 8, 255)), (1793, 8), (2048, 8), (2049, 8)],
)
def test_tiles_of_any_rows_give_the_oracle_s_bits(S, rows, dtype):
    different, *launched = train_and_back(Case((2, 8, S), dtype, **LIMITS, relu=True))
    assert different == []
    assert {option for (launch,) in launched for option in launch.options if "TILE_ROWS" in option} == {
        f"-DTILE_ROWS={rows}"
    }


@pytest.mark.every_value
@pytest.mark.parametrize(
    ("case", "step", "gradient"),
    [
        (Case((40, 16, 20), kilobytes=27), (4, 8), (8, 8)),
        (Case((33, 16, 49), kilobytes=33, relu=True), (8, 8), (8, 8)),  # blocks of eight samples, of one, of none
        (Case((300, 24, 1), kilobytes=12), (4, 16), (8, 16)),
        (Case((300, 24, 1), kilobytes=20), (2, 8), (4, 8)),
        (Case((9, 16, 300)), (8, 8), (8, 8)),
        (
            Case((3, 8, 4500), "bfloat16", 140, residual=True, relu=True),
            (8, 8),
            (8, 8),
        ),  # two tiles of a sample's three
        (Case((64, 64, 36), "bfloat16", 227, residual=True, relu=True, multiprocessors=16), (8, 32), (8, 32)),
        (Case((5, 16, 512), "float64", 227), (4, 8), (8, 8)),
    ],
    ids=lambda value: "" if isinstance(value, tuple) and len(value) == 2 else None,
)
@pytest.mark.parametrize("order", [Order.ASCENDING, Order.REVERSED, shuffled(3)])
def test_a_cluster_gives_the_oracle_s_bits_in_any_order(case, step, gradient, order):
    assert check(case._replace(order=order, channels_last=True)) == (step, gradient)


@pytest.mark.every_pair
@pytest.mark.parametrize(
    ("extents", "options"),
    [
        ((9, 24, 5), {}),
        ((9, 24, 5), {"gap": 3}),
        ((5, 20, 70), {}),
        ((3, 24, 70), {"relu": True}),
        ((33, 40, 1), {"gap": 8}),
    ],
    ids=["octets", "octets apart", "half of an octet", "bits", "2-d, apart"],
)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("offset", range(8))
def test_every_alignment_gives_the_oracle_s_bits(extents, options, in_place, offset):
    offsets = (offset, (3 * offset + 1) % 8, (5 * offset + 2) % 8, (7 * offset + 4) % 8)
    check(Case(extents, "bfloat16", **LIMITS, residual=True, offsets=offsets, in_place=in_place, **options))


STEP, MASKED = NormalizeOptions(False, False), NormalizeOptions(False, False, keep_mask=True)
GRADIENT = GradientOptions("none", False, False)


def slab(extents, options=STEP, *, kilobytes=227, capability=(9, 0), apart=0, multiprocessors=132):
    """What is planned for bfloat16; `apart`: positions between samples."""
    _, C, S = extents
    positions = ((S,), (C,)) if S > 1 else ((), ())
    o = Operand(0, "bfloat16", C * (S + apart), 1, *positions)
    limits = Limits(multiprocessors, kilobytes << 10, capability)
    return plan.slab_channels(Extents(*extents), Operands(o, o, o), options, limits)


def test_what_does_not_fit_is_not_resident():
    assert slab((32, 1024, 196)).cluster > 1
    assert slab((64, 1024, 49), capability=(8, 0)).cluster == 1  # a narrow slice fits
    assert slab((128, 1024, 49), capability=(8, 0)) is None
    assert slab((32, 256, 56 * 56)) is None
    assert slab((65536, 64, 1)) is None
    assert slab((0, 8, 49)) is None
    assert slab((4, 8, 49), apart=1) is None  # there is no one step from row to row
    assert slab((1, 8, 49), apart=1)


def test_a_few_blocks_are_no_device():
    assert slab((4096, 32, 1), multiprocessors=16)
    assert slab((20000, 16, 1), multiprocessors=132) is None
    assert slab((20000, 16, 1), multiprocessors=32)


def test_blocks_share_no_byte_of_a_relu_mask():
    assert slab((2, 16, 49), MASKED)
    assert slab((2, 12, 49), MASKED) is None
    assert slab((2, 12, 49))


@pytest.mark.parametrize(
    ("extents", "blocks"),
    [
        ((128, 512, 1), 32),
        ((1024, 1024, 1), 132),
        ((32, 2048, 49), 132),
        ((32, 1024, 196), 132),
        ((256, 2048, 49), 132),
    ],
)
def test_there_are_blocks_for_the_device(extents, blocks):
    for options in (STEP, GRADIENT):
        launch = slab(extents, options)
        assert min(launch.grid, 132) == blocks
        assert launch.shared_bytes <= 227 << 10
