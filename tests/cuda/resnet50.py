"""The normalisations of ResNet-50 as they are planned for some devices: kernels, grids, bytes."""

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cubn._types import (
    ITEMSIZE,
    Affine,
    Counters,
    Extents,
    GradientOptions,
    NormalizeOptions,
    Operand,
    Operands,
    Running,
    Vector,
)
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.parameters import members
from cubn.backends.cuda.plan import Launch, Limits
from cubn.cli.networks import NETWORKS
from tests.cuda import calls
from tests.cuda.specialisations import Recorder

LAYERS = tuple(dict.fromkeys((layer.channels, layer.size) for layer in NETWORKS["resnet50"](224)))
"""Channels, and positions along a side."""

BATCHES = (32, 256)
LAYOUTS = ("nchw", "nhwc")
OPERATIONS = ("forward_train", "backward")
FLOOR = {"forward_train": 2, "backward": 3}
"""Times that an array's bytes move at least."""
ADDRESS = 1 << 44  # no number of a plan is as large


@dataclass(frozen=True)
class Device:
    """Numbers of a device's data sheet, and of NVIDIA's table of technical specifications per compute capability."""

    limits: Limits
    shared_bytes: int  # of a multiprocessor
    reserved_bytes: int  # of these, for each block
    threads: int  # of a multiprocessor
    blocks: int  # of a multiprocessor
    gigahertz: float
    terabytes: float  # a second, of its memory
    doubles: int  # instructions of float64 that a multiprocessor begins in a cycle, in lanes

    @property
    def architecture(self) -> int:
        major, minor = self.limits.capability
        return 10 * major + minor


KIB = 1 << 10
DEVICES = {
    "H200": Device(Limits(132, 227 * KIB, (9, 0), 50 << 20), 228 * KIB, KIB, 2048, 32, 1.98, 4.8, 64),
    "H100": Device(Limits(132, 227 * KIB, (9, 0), 50 << 20), 228 * KIB, KIB, 2048, 32, 1.98, 3.35, 64),
    "A100": Device(Limits(108, 163 * KIB, (8, 0), 40 << 20), 164 * KIB, KIB, 2048, 32, 1.41, 2.04, 32),
    "RTX 4090": Device(Limits(128, 99 * KIB, (8, 9), 72 << 20), 100 * KIB, KIB, 1536, 24, 2.52, 1.01, 2),
    "T4": Device(Limits(40, 64 * KIB, (7, 5), 4 << 20), 64 * KIB, 0, 1024, 16, 1.59, 0.32, 2),
}
PASSES = Limits(132, 0, (9, 0))
"""A device like the first where no channel fits on chip."""


class Layer(NamedTuple):
    """A normalisation and its ReLU, whose gate the gradient computes again."""

    N: int
    C: int
    side: int
    layout: str = "nchw"
    dtype: str = "bfloat16"
    operation: str = "forward_train"

    @property
    def extents(self) -> Extents:
        return Extents(self.N, self.C, self.side**2)


class Launched(NamedTuple):
    launch: Launch
    parameters: bytes


class _Recorder(Recorder):
    """Keeps parameters besides, whose addresses are large."""

    def address(self, array):
        return ADDRESS

    def launch(self, launch, parameters, *stream):
        self.launched.append(Launched(launch, bytes(parameters)))


@functools.lru_cache(4096)
def launches(layer: Layer, limits: Limits) -> tuple[Launched, ...]:
    """What a call of the operation launches."""
    recorder = _Recorder(limits)
    backend = CudaBackend(recorder)
    extents = layer.extents
    _, C, S = extents
    steps = (C * S, S, 1) if layer.layout == "nchw" else (C * S, 1, C)
    x = Operand(ADDRESS, layer.dtype, *steps[:2], (S,), (steps[2],))
    v = Vector(ADDRESS, "float32", 1)
    affine = Affine(v, v)
    options = NormalizeOptions(False, True, False)
    statistics, _ = calls.train(
        backend, extents, Operands(x, None, x), affine, options, Running(v, v), Counters(ADDRESS, ADDRESS)
    )
    if layer.operation == "forward_train":
        return tuple(recorder.launched)
    recorder.launched.clear()
    gradient = GradientOptions("recompute", False, False)
    calls.backward(backend, extents, Operands(x, x, x), statistics, None, gradient, (v, v))
    return tuple(recorder.launched)


def over_elements(found: tuple[Launched, ...]) -> list[Launched]:
    """Those that go over all elements."""
    return [each for each in found if any(option.startswith("-DELEMENT=") for option in each.launch.options)]


def moved(layer: Layer, found: tuple[Launched, ...]) -> int:
    """Times that an array's bytes move: one array is read for moments, two for sums."""
    floor = FLOOR[layer.operation]
    return sum(floor - 1 if each.launch.kernel.startswith("reduce") else floor for each in over_elements(found))


def is_resident(found: tuple[Launched, ...]) -> bool:
    """Whether one kernel does it all."""
    return len(over_elements(found)) == 1


def takes_tickets(launch: Launch) -> bool:
    return launch.source.startswith("ticketed")


def on_chip(found: tuple[Launched, ...]) -> bool:
    """Whether it keeps what it reads in shared memory."""
    return over_elements(found)[0].launch.kernel.startswith("slab")


def apart(parameters: bytes) -> tuple[bytes, dict[str, int]]:
    """The same with addresses that are far apart, by the member that has them."""
    block, bases = bytearray(parameters), {}
    for name, member in members().items():
        (value,) = struct.unpack_from("q", block, 8 * member.word)
        if not member.is_double and value >= ADDRESS:
            bases[name] = (member.word + 1) << 40
            struct.pack_into("q", block, 8 * member.word, bases[name] | value - ADDRESS)
    return bytes(block), bases


def of_one_group(parameters: bytes) -> bytes:
    """Of a kernel whose blocks take tickets: for the first group of channels alone."""
    block = bytearray(parameters)
    (rows,) = struct.unpack_from("q", block, 8 * members()["rows"].word)
    for name in ("pieces", "ahead"):
        struct.pack_into("q", block, 8 * members()[name].word, rows)
    return bytes(block)


COUNTS = {"count", "node_count", "from_count", "tracked", "skipped"}
SINGLE = {"gamma.pointer", "beta.pointer", "coefficients", "old_mean.pointer", "old_var.pointer"}


def contents(layer: Layer, bases: dict[str, int]) -> dict[int, np.ndarray]:
    """Numbers for what kernels read: normal ones, of which a sample has as many as of an odd number repeat."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(65521).astype(np.float32)
    if layer.dtype == "bfloat16":
        elements = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        elements = values.astype(layer.dtype)
    assert elements.itemsize == ITEMSIZE[layer.dtype]
    positive = np.abs(values) + np.float32(0.5)
    found = {}
    for name, base in bases.items():
        if name in ("x.pointer", "g.pointer", "y.pointer", "r.pointer"):
            found[base] = elements
        elif name == "tickets":
            found[base] = np.zeros(2, np.uint32)
        elif name in COUNTS:
            found[base] = np.full(8, layer.N * layer.side**2, np.int64)
        else:
            found[base] = positive if name in SINGLE else positive.astype(np.float64)
    return found
