"""What is counted: small arrays in every layout, the calls that run the kernels of each, and plain loops beside."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from contracts import CONTRACTS, Contract
from counting import Counting, counting
from cycle_tables import PLAIN, STEPS, title
from plain import plain
from throughput import PROCESSORS, Cost, cost
from trees import Row

import cubn
from cubn.backends.cpu import compile, plan
from cubn.backends.cpu.simd import LANES


class Array(NamedTuple):
    """How kernels read it, and an array small enough for all of its instructions to be simulated: (N, C, *extent).

    `slab`: statistics and pass are one kernel, where the planner has one, or else none of the planner's.
    """

    layout: str
    name: str
    shape: tuple[int, ...]
    slab: bool = False

    @property
    def per_lane(self) -> bool:
        """Whether neighbours are of different channels."""
        return not self.layout.startswith("nchw")


ARRAYS = (
    Array("nchw_long", "8@56²", (1, 8, 56, 56)),
    Array("nchw_short", "64@7²", (4, 64, 7, 7)),
    Array("nhwc", "16@56²", (1, 16, 56, 56)),
    Array("nhwc", "256@14²", (1, 256, 14, 14)),
    Array("nhwc_2d", "(2048, 16)", (2048, 16)),
    Array("narrow", "(2048, 8)", (2048, 8)),
    # of other shapes than above, since what was prepared for these is kept
    Array("nchw_long", "slab of 8@56²", (2, 8, 56, 56), slab=True),
    Array("nchw_short", "slab of 64@7²", (17, 64, 7, 7), slab=True),
)
OF_CONTRACTS = (ARRAYS[0], ARRAYS[2], ARRAYS[4])
SAMPLES_AS_POSITIONS = (Array("nhwc_2d", "(2048, 16)", (1, 16, 32, 64)),)


def counted(name: str, dtype: str, only: str, contract: str) -> Iterator[Row]:
    """What each kernel takes for an element of each array, on one processor; under one of CONTRACTS, fewer of them."""
    cubn.set_num_threads(1)
    logging.getLogger("cubn").setLevel(logging.ERROR)  # it would say how long compiling takes
    as_planned, other, arrays = plan.slab, Contract(), ARRAYS
    if contract:
        other = CONTRACTS[contract]
        other.change()
        arrays = SAMPLES_AS_POSITIONS if other.samples_as_positions else OF_CONTRACTS

    def wanted(kernel: str, array: Array) -> bool:
        if kernel not in STEPS or kernel.endswith("slab") != array.slab:
            return False
        called = title(kernel, array.layout, array.name)
        return bool(re.search(only, called) and re.search(other.only, called))

    with counting(name, PROCESSORS[name], other.edit) as count:
        for array in arrays:
            plan.slab = as_planned if array.slab else lambda *_: None
            left = {kernel for kernel in STEPS if wanted(kernel, array)}
            for call in operations(array, dtype):
                if not left:
                    break
                for ran in count.run(call):
                    kernel = ran.partition("-")[0]
                    if kernel in left:
                        left.remove(kernel)
                        found = cost(count.way(ran), PROCESSORS[name])
                        yield row(kernel, array.layout, array.name, found, math.prod(array.shape))
        for layout in () if contract else ("nchw", "nhwc"):
            for loop in ("moments", "sums", "normalize", "input_gradient"):
                if re.search(only, title(loop, layout, PLAIN)):
                    yield row(loop, layout, PLAIN, *plain_cost(count, name, loop, dtype, layout == "nhwc"))


def operations(array: Array, dtype: str) -> Iterator[Callable[[], object]]:
    """Calls whose kernels are counted."""
    x = torch.randn(array.shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    if array.per_lane and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    state, out = cubn.BatchNormState(array.shape[1]), torch.empty_like(x)
    yield lambda: cubn.forward(x, state, out=out)
    yield lambda: cubn.forward_train(x, state, out=out)
    _, saved = cubn.forward_train(x, state)
    yield lambda: cubn.backward(x, saved, out=out)


def plain_cost(count: Counting, name: str, loop: str, dtype: str, per_lane: bool) -> tuple[Cost, int]:
    """Of a plain loop over one vector after the other, and how many elements these have."""
    vectors = 12 * 64
    memory = np.zeros((4, vectors * LANES))  # x, dy, coefficients, what is computed
    block = np.array([vectors, *(part.ctypes.data for part in memory)])
    kernel = compile.compiled(f"plain-{loop}-{per_lane}", lambda: plain(loop, dtype, per_lane))
    (ran,) = count.run(lambda: kernel.call(block.ctypes.data, 0))
    return cost(count.way(ran), PROCESSORS[name]), vectors * LANES


def row(kernel: str, layout: str, array: str, found: Cost, elements: int) -> Row:
    resource, bound = found.bottleneck
    of_all = {key: value for key, value in found._asdict().items() if key != "taken"} | {"bound": bound}
    each = {key: round(value / elements, 4) for key, value in of_all.items()}
    return {"kernel": kernel, "layout": layout, "array": array, **each, "bottleneck": resource}
