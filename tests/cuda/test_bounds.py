"""No element past an array's last is read or written: arrays end with their allocation, where AddressSanitizer watches.

At every element-aligned address, with every number of neighbours in memory from one vector to the next; by default at
two addresses for each number, so that arrays begin and end in every place of a vector.
`python -m tests.cuda.test_bounds two|all NAME ...` runs some, in a child of sanitized.run().
"""

import sys
from typing import NamedTuple

import pytest

from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Limits
from tests.cuda import calls
from tests.cuda.named import PASSES, RESIDENT
from tests.cuda_on_cpu import sanitized
from tests.cuda_on_cpu.build import ADDRESS
from tests.cuda_on_cpu.device import CpuDevice

OFFSETS = range(8)  # 16-bit elements past a vector
SHORT = range(17, 25)  # three octets, for four lanes or threads
LONG = range(257, 265)  # an octet in the second row of a tile


class Kernels(NamedTuple):
    """Those that a device of these limits takes for a layout."""

    limits: Limits
    layout: str = "nchw"
    neighbours: range = SHORT  # positions or channels
    masked: bool = False


KERNELS = {
    "resident": Kernels(RESIDENT),
    "resident, two rows": Kernels(RESIDENT, neighbours=LONG),
    "rows": Kernels(PASSES),
    "rows, two rows": Kernels(PASSES, neighbours=LONG),
    "rows, whole vectors apart": Kernels(PASSES, "nchw, whole vectors apart"),
    "channels": Kernels(PASSES, "nhwc"),
    "strided": Kernels(PASSES, "backwards"),
    "masked": Kernels(PASSES, masked=True),
}


def run(name: str, addresses: str) -> None:
    """Every operation; what comes out is tested elsewhere."""
    limits, layout, neighbours, masked = KERNELS[name]
    backend = CudaBackend(CpuDevice(limits))
    for i, length in enumerate(neighbours):
        extents = (1, length, 15) if layout == "nhwc" else (1, 3, length)
        for offset in OFFSETS if addresses == "all" else {0, i}:
            options = {"residual": True, "relu": limits is PASSES, "masked": masked}  # bits would align the octets of y
            calls.results(backend, calls.Layer(extents, "bfloat16", layout, (offset,) * 6, **options))


@pytest.mark.parametrize("addresses", ["two", pytest.param("all", marks=pytest.mark.full)])
def test_no_element_past_the_last_is_touched(addresses):
    if reason := sanitized.unavailable(ADDRESS):
        pytest.skip(reason)
    process = sanitized.run(["-m", "tests.cuda.test_bounds", addresses, *KERNELS], ADDRESS)
    assert (process.returncode, process.stderr) == (0, "")


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        run(argument, sys.argv[1])
