"""Steps and gradients whose channels stay in the level-2 cache: the oracle's bits, whoever takes which ticket."""

import math

import pytest

from cubn._types import ITEMSIZE
from cubn.backends.cuda.plan import tickets
from tests.cuda import plans
from tests.cuda.steps import DTYPES, Case, train_and_back
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.runner import shuffled

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """As many as of large arrays."""
    monkeypatch.setattr(tickets, "PIECE_BYTES", 4096)
    plans.forget()
    yield
    plans.forget()


def check(case):
    """The launches of a step and a gradient, on a device whose cache is just too small for the step."""
    size = math.prod(case.extents) * ITEMSIZE[case.dtype]
    different, step, gradient = train_and_back(case._replace(kilobytes=0, l2_bytes=2 * size - 1))
    assert different == []
    kernel = "ticketed_channels" if case.channels_last else "ticketed"
    assert [launch.kernel for launch in step] == [kernel]
    assert [launch.kernel for launch in gradient] == ["coefficients", kernel]
    return step[0], gradient[1]


ROWS = (5, 12, 784)  # a tile a sample, the last row of it short
TILES = (3, 8, 4504)  # three a sample, padded to four
GROUPS = (33, 26, 196)  # octets run over the ends of channels; the last group is short


@pytest.mark.every_value
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("extents", "options"),
    [
        (ROWS, {"relu": True}),
        (TILES, {"residual": True, "relu": True}),
        (GROUPS, {"residual": True, "relu": True}),
        ((9, 20, 64), {"frozen": True, "residual": True}),
        ((21, 96, 49), {"channels_last": True, "residual": True, "relu": True}),
        ((2, 328, 264), {"channels_last": True, "relu": True}),
        ((600, 136, 1), {"channels_last": True, "relu": True}),
        ((130, 200, 3), {"channels_last": True, "frozen": True, "relu": True}),
    ],
    ids=["rows", "tiles", "groups", "frozen", "channels with bits", "channels of rows", "2-d", "few positions"],
)
def test_every_dtype_gives_the_oracle_s_bits(dtype, extents, options):
    check(Case(extents, dtype, **options))


@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("order", [*range(8), *map(shuffled, range(4))])
def test_blocks_may_start_in_any_order(order, multiprocessors):
    check(Case((19, 26, 64), "bfloat16", relu=True, order=order, multiprocessors=multiprocessors))


@pytest.mark.every_pair
@pytest.mark.parametrize("extents", [(19, 26, 64), (9, 14, 196), (16, 160, 9)], ids=["rows", "groups", "channels"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("offset", range(8))
def test_every_alignment_gives_the_oracle_s_bits(extents, in_place, offset):
    last = extents[2] == 9
    x, dy = (4 * offset % 8, offset // 2 % 2 * 4) if last else (offset, 5 * offset)
    offsets = (x, (3 * offset + 1) % 8, dy, (7 * offset + 4) % 8)
    check(Case(extents, "bfloat16", residual=True, offsets=offsets, in_place=in_place, channels_last=last))


@pytest.mark.parametrize("gap", [3, 8])
@pytest.mark.parametrize("last", [False, True])
def test_rows_apart_give_the_oracle_s_bits(gap, last):
    extents = (16, 160, 10) if last else (5, 12, 256)
    check(Case(extents, "bfloat16", gap=4 if last and gap == 3 else gap, channels_last=last, relu=True))


def test_a_group_of_many_rows_is_merged_in_parts(monkeypatch):
    monkeypatch.setattr(tickets, "MERGED_BYTES", 4096)
    step, _ = check(Case((2100, 128, 4), "bfloat16", channels_last=True))
    assert dict(step.fields)["at_once"] < dict(step.fields)["group"]
