"""Every element-aligned address, small and odd shapes, any order of threads: the oracle's results, to the bit.

A row puts x, residual, y, dy, dx and dresidual each at an offset of its own from a multiple of 16 bytes. Any two values
of any two columns meet in a row; by default a few rows have every value.
"""

import math

import pytest

from cubn._types import ITEMSIZE
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import VECTOR_BYTES
from tests.conftest import CUDA_ON_CPU
from tests.cuda import calls
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice
from tests.cuda_on_cpu.runner import Order, shuffled
from tests.ops.pairwise import covering, every_pair, others_full, whole_product

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

SIZE = 100_000  # elements, at most
ARRAYS = ["x", "residual", "y", "dy", "dx", "dresidual"]
AXES = {
    "N": [1, 2, 3, 5, 8, 16, 33],
    "C": [1, 3, 65, 96, 160, 320],
    "S": [1, 9, 49, 196, 300],
    "dtype": list(ITEMSIZE)[:4],
    "layout": ["nchw", "nhwc"],
    **{name: range(8) for name in ARRAYS},
    "options": ["plain", "relu", "residual", "residual-relu"],
    "frozen": [False, True],
    "masked": [False, True],
    "device": list(CUDA_ON_CPU),
    "order": ["ascending", "reversed", "shuffled", "shuffled again"],
}


ORDERS = {
    "ascending": Order.ASCENDING,
    "reversed": Order.REVERSED,
    "shuffled": shuffled(1),
    "shuffled again": shuffled(2),
}


def allowed(row):
    small = math.prod(row[name] for name in "NCS" if name in row) <= SIZE
    return small and all(
        row[name] * ITEMSIZE[row.get("dtype", "float16")] < VECTOR_BYTES for name in ARRAYS if name in row
    )


def check(row):
    layer = calls.Layer(
        (row["N"], row["C"], row["S"]),
        row["dtype"],
        row["layout"],
        tuple(row[name] for name in ARRAYS),
        residual="residual" in row["options"],
        relu="relu" in row["options"],
        masked=row["masked"],
        frozen=row["frozen"],
    )
    cuda = CudaBackend(CpuDevice(CUDA_ON_CPU[row["device"]], ORDERS[row["order"]]))
    calls.check(cuda, layer)


ROWS = every_pair(AXES, allowed)


@pytest.mark.parametrize(
    "row",
    others_full([(row,) for row in ROWS], covering(ROWS, 1)),
    ids=lambda row: "-".join(map(str, row.values())),
)
def test_any_address_gives_the_oracle_s_bits(row):
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("device", CUDA_ON_CPU)
@pytest.mark.parametrize("layout", AXES["layout"])
@pytest.mark.parametrize("dtype", AXES["dtype"])
def test_every_shape_at_every_address_gives_the_oracle_s_bits(dtype, layout, device, order):
    chosen = {"dtype": [dtype], "layout": [layout], "device": [device], "order": [order]}
    for row in whole_product({**AXES, **chosen}, [*chosen, "N", "C", "S", "x"], allowed):
        try:
            check(row)
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from error
