"""What the backend launches over named shapes, layouts and every option of every operation, without a device.

Kernels are specialised by the planner and the backend alone: asking them leaves no option out, however new.
"""

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cubn
from cubn._types import (
    ITEMSIZE,
    Affine,
    CombineOptions,
    Counters,
    Extents,
    GradientOptions,
    NormalizeOptions,
    Operand,
    Operands,
    Running,
    Update,
    Vector,
)
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Launch, Limits
from tests.cuda import calls
from tests.kept import kept

SOURCES = [*Path(cubn.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
"""What the specialisations depend on, and more."""

DTYPES = ("float16", "bfloat16", "float32", "float64")

LIMITS = (
    Limits(40, 64 << 10, (7, 5)),  # a T4: no clusters
    Limits(108, 163 << 10, (8, 0), 40 << 20),  # an A100: no clusters, a large cache
    Limits(132, 227 << 10, (9, 0), 50 << 20),  # an H100: clusters, the most shared memory
    Limits(170, 99 << 10, (12, 0), 96 << 20),  # an RTX 5090: clusters, less of it
    Limits(132, 0, (9, 0)),  # no channel fits on chip: never the resident kernels
)
CLUSTERS_FROM = 90  # the first architecture with clusters

SHAPES = {
    "a value a sample": (64, 1024, 1),
    "a value a sample, few channels": (33, 12, 1),
    "a value a sample, odd channels": (33, 33, 1),
    "two values a sample": (17, 48, 2),
    "four values a sample": (16, 256, 4),
    "one channel": (4, 1, 300),
    "three channels": (2, 3, 7),
    "six channels": (2, 6, 20),
    "odd channels": (6, 65, 49),
    "twelve channels": (3, 12, 16),
    "two octets": (3, 24, 12),
    "four octets": (2, 40, 30),
    "sixteen octets": (2, 96, 100),
    "7 x 7": (32, 2048, 49),
    "14 x 14": (32, 1024, 196),
    "14 x 14, many samples": (256, 1024, 196),
    "many samples": (65536, 1024, 1),
    "four values, many samples": (16384, 1024, 4),
    "28 x 28": (32, 512, 28 * 28),
    "six rows, odd": (2, 40, 1501),
    "seven rows": (2, 40, 1600),
    "eight rows": (2, 40, 1900),
    "whole tiles": (2, 40, 4096),
    "56 x 56": (32, 256, 56 * 56),
    "112 x 112": (256, 64, 112 * 112),
    "volume": (2, 32, 128**3),
    "odd rows": (3, 40, 2501),
    "over 2^31 elements": (5, 64, 1 << 23),
    "over 2^31 elements, odd": (5, 67, 6500001),
}
"""N, C, S."""

ODD_SHAPES = {
    "a value a sample, few channels",
    "a value a sample, odd channels",
    "one channel",
    "six channels",
    "four octets",
    "7 x 7",
    "14 x 14",
    "odd rows",
}
"""Those that are taken in unusual memory too."""


class Layout(NamedTuple):
    """Where the elements of an array are."""

    name: str
    offset: int = 0  # of the first, in elements

    def operand(self, extents: Extents, dtype: str) -> Operand:
        _, C, S = extents
        sample, channel, position = {
            "nchw": (C * S, S, 1),
            "nhwc": (C * S, 1, C),
            "reversed": (-C * S, -S, -1),
        }[self.name]
        positions = ((S,), (position,)) if S > 1 else ((), ())
        return Operand(ADDRESS + self.offset * ITEMSIZE[dtype], dtype, sample, channel, *positions)


ADDRESS = 1 << 20
DENSE = (Layout("nchw"), Layout("nhwc"))
MASKED = (Layout("nchw"),)  # kernels behind a mask go by strides, whatever these are
ODD = (Layout("nhwc", offset=1), Layout("nhwc", offset=2), Layout("reversed"))  # memory of smaller vectors, and of none


class Recorder:
    """A device that only writes down what it is asked to launch; see cubn.backends.cuda.device.Device."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.launched: list[Launch] = []

    def stream(self):
        """The only one."""
        return self

    def capturing(self):
        return False

    def empty(self, shape, dtype):
        """Any shape in the memory of one element."""
        return np.broadcast_to(np.zeros((), dtype), shape)

    zeros = empty

    def from_host(self, values):
        return values

    def to_host(self, array):
        return array

    def synchronize(self):
        """Nothing runs."""

    def address(self, array):
        return ADDRESS

    def compile(self, launches):
        """Nothing runs."""

    def launch(self, launch, parameters, stream):
        self.launched.append(launch)


def run_everything(backend: CudaBackend, extents: Extents, layout: Layout, dtype: str) -> None:
    """Every operation with every option."""
    x = layout.operand(extents, dtype)
    mask = Layout("nchw").operand(extents, "bool")._replace(channel_stride=0)
    vector = Vector(ADDRESS, "float32", 1)
    affine, running = Affine(vector, vector), Running(vector, vector)
    statistics = backend.new_statistics(extents.C, affine)
    backend.keep(affine, statistics)
    backend.frozen_statistics(running, 1e-5, statistics)
    zeros = backend.device.zeros((extents.C,), "float64")
    backend.statistics(np.int64(2), zeros, zeros, 1e-5, statistics)
    backend.update(statistics, running, running, Counters(ADDRESS, ADDRESS), Update(0.1, False))
    renormalised = backend.renormalise(backend.new_renormalised(extents.C, affine), statistics, 3.0, 5.0)
    backend.parameter_gradients(renormalised, (zeros, zeros), *affine)
    for present in (None, mask) if layout in MASKED else (None,):
        backend.root(backend.moments(extents, Operands(x, mask=present), 0))
        for residual, relu in itertools.product((None, x), (False, True)):
            keep = relu and residual is not None
            options = NormalizeOptions(residual is not None, relu, keep)
            operands = Operands(x, residual, x, mask=present)
            calls.forward(backend, extents, operands, affine, running, replace(options, keep_mask=False))
            statistics, relu_mask = calls.train(backend, extents, operands, affine, options)
            backend.normalize(extents, operands, statistics, affine, options)
            how = "none" if not relu else "mask" if keep else "recompute"
            given = (extents, Operands(x, x, x, residual, present), statistics, relu_mask)
            for is_frozen in (False, True):
                gradient = GradientOptions(how, is_frozen, residual is not None)
                sums = calls.backward(backend, *given, gradient)
                backend.backward_apply(*given, None if is_frozen else sums, gradient)
                backend.root_sums(backend.backward_sums(*given, gradient, 0))
            if how == "recompute":  # dy behind a ReLU by itself
                read = Operands(x, x, x, x, present)
                backend.backward_apply(extents, read, statistics, None, None, GradientOptions(how, True, True))
            for third in ("none", "added") if relu else ("none", "added", "weighted"):
                read = Operands(x, x, x, None if third == "none" else x, present)
                combined = CombineOptions(how, third)
                backend.backward_apply(extents, read, statistics, relu_mask, sums, combined)
            backend.parameter_gradients(statistics, sums, *affine)


class Specialisation(NamedTuple):
    """A kernel with its options."""

    source: str
    kernel: str
    options: tuple[str, ...]

    def __str__(self) -> str:
        return "-".join((self.kernel, *(option[2:].replace("=", "_") for option in self.options)))

    @property
    def values(self) -> dict[str, str]:
        """The options by name."""
        return dict(option[2:].split("=") for option in self.options)

    def fits(self, architecture: int) -> bool:
        """Whether it is for such devices: clusters are of newer ones."""
        return architecture >= CLUSTERS_FROM or self.values.get("CLUSTER", "1") == "1"


@functools.cache
def specialisations() -> tuple[Specialisation, ...]:
    """All of them, those of a kernel next to one another."""
    found = kept("specialisations", SOURCES, every_specialisation)
    return tuple(Specialisation(source, kernel, tuple(options)) for source, kernel, options in found)


def every_specialisation() -> list[Specialisation]:
    """What is launched, in order."""
    found = set()
    for limits in LIMITS:
        recorder = Recorder(limits)
        backend = CudaBackend(recorder)
        for (name, shape), dtype in itertools.product(SHAPES.items(), DTYPES):
            for layout in DENSE + (ODD if name in ODD_SHAPES else ()):
                run_everything(backend, Extents(*shape), layout, dtype)
        found |= {Specialisation(launch.source, launch.kernel, launch.options) for launch in recorder.launched}
    return sorted(found)
