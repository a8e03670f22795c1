"""Layers that between them take the planner into every one of its branches, small enough to be run on the CPU.

`python -m tests.cuda.named NAME ...` runs some, in a child of sanitized.run().
"""

import sys
from dataclasses import replace
from typing import NamedTuple

from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Launch, Limits
from tests.cuda import calls
from tests.cuda.calls import Layer
from tests.cuda_on_cpu.device import SMALL, CpuDevice
from tests.cuda_on_cpu.runner import shuffled

RESIDENT = SMALL
PASSES = replace(RESIDENT, shared_bytes=0)  # no channel fits on chip: never the resident kernel
OLD = replace(RESIDENT, capability=(7, 5))  # without clusters
CACHED = replace(PASSES, l2_bytes=560 << 10)  # nor do all, but some, fit the cache
LARGE = Limits(multiprocessors=108, shared_bytes=163 << 10, capability=(8, 0))  # likewise: an A100


class Named(NamedTuple):
    layer: Layer
    limits: Limits = RESIDENT


NAMED = {
    # a channel fits on chip
    "resident": Named(Layer((4, 32, 196))),
    "resident, a cluster": Named(Layer((2, 1, 5000))),
    "resident, without clusters": Named(Layer((2, 1, 5000), "bfloat16"), OLD),
    "resident, most of a multiprocessor": Named(Layer((2, 1, 30000))),
    "resident, most of a multiprocessor, float64": Named(Layer((2, 1, 15000), "float64")),
    "resident, four rows": Named(Layer((3, 5, 784), "bfloat16")),
    "resident, whole tiles": Named(Layer((1, 2, 2048), "bfloat16")),
    "resident, a row by lanes": Named(Layer((3, 24, 196), "bfloat16"), LARGE),
    "resident, torn channels": Named(Layer((3, 6, 301), "float16")),
    "resident, a row a thread": Named(Layer((9, 12, 49), "bfloat16")),
    "resident, few positions": Named(Layer((8, 3, 7), "float16")),
    "resident, torn octets": Named(Layer((40, 4, 196))),
    "resident, bits": Named(Layer((3, 64, 49), "bfloat16", residual=True, relu=True)),
    "resident, bits that tear": Named(Layer((3, 65, 49), residual=True, relu=True)),
    "resident, bits of all channels": Named(Layer((1, 3, 49), residual=True, relu=True)),
    "resident, off a vector": Named(Layer((3, 16, 64), offsets=(1,) * 6)),
    "resident, channels apart": Named(Layer((3, 16, 64), layout="nchw, channels apart")),
    "resident, values": Named(Layer((70, 24, 1), "bfloat16")),
    "resident, values, few": Named(Layer((9, 8, 1)), LARGE),
    "resident, channels": Named(Layer((8, 64, 49), layout="nhwc")),
    "resident, channels, a cluster": Named(Layer((40, 16, 49), "bfloat16", layout="nhwc", residual=True, relu=True)),
    "resident, channels, without clusters": Named(Layer((5, 65, 9), layout="nhwc"), OLD),
    "resident, channels, most of a multiprocessor": Named(Layer((1, 8, 1200), layout="nhwc", offsets=(1,) * 6)),
    "resident, channels, positions apart": Named(Layer((3, 6, 9), layout="nhwc, positions apart")),
    "resident, channels, float64": Named(Layer((2, 16, 300), "float64", layout="nhwc")),
    "resident, channels, tiles": Named(Layer((1, 6, 2100), "float16", layout="nhwc")),
    # or not
    "rows": Named(Layer((4, 64, 784)), PASSES),
    "rows, few": Named(Layer((2, 4, 64)), PASSES),
    "rows, a lane": Named(Layer((90, 33, 49), "bfloat16"), PASSES),
    "rows, two lanes": Named(Layer((40, 24, 49)), PASSES),
    "rows, four lanes": Named(Layer((16, 33, 196), "float16"), PASSES),
    "rows, odd, one channel": Named(Layer((2, 1, 49)), PASSES),
    "rows, odd, one sample": Named(Layer((1, 3, 49)), PASSES),
    "rows, odd, channels apart": Named(Layer((2, 3, 49), layout="nchw, channels apart"), PASSES),
    "rows, odd, samples apart": Named(Layer((2, 3, 49), layout="nchw, samples apart"), PASSES),
    "rows, odd, large": Named(Layer((2, 17, 2501), "float16", offsets=(1,) * 6)),
    "rows, many samples": Named(Layer((5000, 3, 9), "float64")),
    "rows, tickets": Named(Layer((20, 6, 784)), CACHED),
    "rows, tickets, groups": Named(Layer((64, 14, 196), "bfloat16", residual=True, relu=True), CACHED),
    "channels": Named(Layer((8, 64, 49), layout="nhwc"), PASSES),
    "channels, tickets": Named(Layer((21, 352, 49), "bfloat16", layout="nhwc", residual=True, relu=True), CACHED),
    "channels, tickets, a tile of rows": Named(Layer((2, 328, 264), layout="nhwc"), CACHED),
    "values, tickets": Named(Layer((600, 264, 1), "bfloat16"), CACHED),
    "channels, few blocks": Named(Layer((2200, 3, 1)), LARGE),
    "channels, many": Named(Layer((12, 256, 196), "bfloat16", layout="nhwc"), PASSES),
    "channels, two rows": Named(Layer((2, 8, 300), layout="nhwc"), PASSES),
    "channels, three rows": Named(Layer((2, 8, 700), "float16", layout="nhwc"), PASSES),
    "channels, four rows": Named(Layer((2, 16, 784), "bfloat16", layout="nhwc"), PASSES),
    "channels, seven rows": Named(Layer((2, 8, 1791), layout="nhwc"), PASSES),
    "channels, odd": Named(Layer((8, 65, 49), layout="nhwc"), PASSES),
    "channels, odd, positions apart": Named(Layer((8, 65, 9), layout="nhwc, positions apart"), PASSES),
    "channels, odd, one value": Named(Layer((1, 33, 1)), PASSES),
    "channels, one sample": Named(Layer((1, 64, 49), layout="nhwc"), PASSES),
    "channels, off a vector": Named(Layer((8, 64, 49), "float16", layout="nhwc", offsets=(2,) * 6), PASSES),
    "channels, samples apart": Named(Layer((8, 64, 49), layout="nhwc, samples apart"), PASSES),
    "channels, float64": Named(Layer((8, 64, 49), "float64", layout="nhwc"), PASSES),
    "values, seven left": Named(Layer((23, 33, 1)), PASSES),
    "values": Named(Layer((5000, 32, 1), "float16"), PASSES),
    "strided": Named(Layer((8, 16, 49), layout="backwards")),
    "strided, one channel": Named(Layer((8, 1, 49), layout="backwards")),
    "strided, rows apart": Named(Layer((4, 24, 50), layout="nhwc, rows apart")),
    "masked": Named(Layer((8, 16, 49), masked=True)),
    "masked, many samples": Named(Layer((9000, 32, 2), masked=True)),
}


def run(name: str, order: int) -> list[Launch]:
    """Compare a layer with the oracle; what was launched for it."""
    layer, limits = NAMED[name]
    device = CpuDevice(limits, order)
    calls.check(CudaBackend(device), layer)
    return device.launched


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run(argument, shuffled(0))
