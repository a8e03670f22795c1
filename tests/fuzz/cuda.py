"""Random layers on the CUDA backend, its kernels compiled for the CPU, planned for devices of random sizes.

Some layers are reduced and applied in turns: their pieces are small, and so is the cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from unittest import mock

from cubn._types import ITEMSIZE
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Limits, tickets
from tests.cuda import calls, plans
from tests.cuda.calls import Layer
from tests.cuda_on_cpu.device import CpuDevice
from tests.cuda_on_cpu.runner import shuffled
from tests.ops import arrays

EDGES = [
    1,
    2,
    3,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    49,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    511,
    513,
    784,
    1025,
    1288,
    1600,
    1999,
    2048,
    2049,
]


@dataclass(frozen=True)
class Case:
    layer: Layer
    limits: Limits
    order: int  # of threads
    piece_bytes: int = tickets.PIECE_BYTES
    run_bytes: int = tickets.RUN_BYTES


def draw(rng: random.Random) -> Case:
    layer = Layer(
        extents(rng),
        rng.choice(arrays.DTYPES),
        offsets=tuple(rng.choice([0, 0, 0, 1, 2, 8]) for _ in range(6)),
        residual=rng.random() < 0.4,
        relu=rng.random() < 0.4,
        frozen=rng.random() < 0.2,
    )
    order = rng.randrange(1 << 16)
    if rng.random() < 0.3:
        return by_tickets(rng, layer, order)
    layouts = [name for name in calls.LAYOUTS if layer.extents[2] % 2 == 0 or "rows apart" not in name]
    limits = Limits(
        multiprocessors=rng.choice([1, 2, 5, 108]),
        shared_bytes=rng.choice([0, 4 << 10, 48 << 10, 163 << 10]),
        capability=rng.choice([(7, 5), (8, 0), (9, 0)]),
        cluster=rng.choice([1, 2, 4, 8, 8, 8]),
    )
    return Case(replace(layer, layout=rng.choice(layouts), masked=rng.random() < 0.2), limits, order)


def extents(rng: random.Random) -> tuple[int, int, int]:
    room, found = rng.choice([1 << 8, 1 << 12, 1 << 13]), {}
    for name in rng.sample("NCS", 3):
        found[name] = rng.choice([e for e in EDGES if e <= room])
        room = max(1, room // found[name])
    N, C, S = (found[name] for name in "NCS")
    return max(N, 2) if S == 1 else N, C, S


def by_tickets(rng: random.Random, layer: Layer, order: int) -> Case:
    """The layer of other extents, which fits the cache a few channels at a time."""
    S, octets = rng.choice(EDGES), rng.choice([1, 2, 3, 5, 17, 40])
    N, last = rng.choice([n for n in EDGES if n * S * octets <= 1 << 12] or [2]), S < 8 or rng.random() < 0.4
    layout = rng.choice([name for name in calls.LAYOUTS if name.startswith("nhwc" if last else "nchw")][:2])
    layer = replace(layer, extents=(max(N, 2), 8 * octets, S), layout=layout)
    offsets = layer.offsets if not last or rng.random() < 0.2 else (0,) * 6
    size = prod(layer.extents) * ITEMSIZE[layer.dtype]
    limits = Limits(rng.choice([1, 2, 5]), 0, (9, 0), rng.choice([2, 3, 4]) * size - 1)
    return Case(
        replace(layer, offsets=offsets), limits, order, rng.choice([1, 1 << 10, 1 << 12]), rng.choice([16, 512])
    )


def simpler(case: Case) -> Iterator[Case]:
    """Without one of the options; every other kernel is compiled first, so not much is tried."""
    layer = case.layer
    for name, plain in {
        "residual": False,
        "relu": False,
        "masked": False,
        "frozen": False,
        "offsets": (0,) * 6,
    }.items():
        if getattr(layer, name) != plain:
            yield replace(case, layer=replace(layer, **{name: plain}))


def run(case: Case) -> None:
    with mock.patch.multiple(tickets, PIECE_BYTES=case.piece_bytes, RUN_BYTES=case.run_bytes):
        plans.forget()
        calls.check(CudaBackend(CpuDevice(case.limits, shuffled(case.order))), case.layer)
