"""Random layers on the CUDA backend, its kernels compiled for the CPU, planned for devices of random sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Limits
from tests.cuda import calls
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
    1025,
    2049,
]


@dataclass(frozen=True)
class Case:
    layer: Layer
    limits: Limits
    order: int  # of threads


def draw(rng: random.Random) -> Case:
    room, extents = rng.choice([1 << 8, 1 << 12, 1 << 13]), {}
    for name in rng.sample("NCS", 3):
        extents[name] = rng.choice([e for e in EDGES if e <= room])
        room = max(1, room // extents[name])
    N, C, S = (extents[name] for name in "NCS")
    layout = rng.choice([name for name in calls.LAYOUTS if S % 2 == 0 or "rows apart" not in name])
    layer = Layer(
        (max(N, 2) if S == 1 else N, C, S),
        rng.choice(arrays.DTYPES),
        layout,
        tuple(rng.choice([0, 0, 0, 1, 2, 8]) for _ in range(6)),
        residual=rng.random() < 0.4,
        relu=rng.random() < 0.4,
        masked=rng.random() < 0.2,
        frozen=rng.random() < 0.2,
    )
    limits = Limits(
        multiprocessors=rng.choice([1, 2, 5, 108]),
        shared_bytes=rng.choice([0, 4 << 10, 48 << 10, 163 << 10]),
        capability=rng.choice([(7, 5), (8, 0), (9, 0)]),
        cluster=rng.choice([1, 2, 4, 8, 8, 8]),
    )
    return Case(layer, limits, rng.randrange(1 << 16))


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
    calls.check(CudaBackend(CpuDevice(case.limits, shuffled(case.order))), case.layer)
