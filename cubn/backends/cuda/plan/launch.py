"""What a plan says: one kernel launch but for the addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cubn._types import CombineOptions, Extents, GradientOptions, NormalizeOptions, Operand, Operands, ReluGradient

ELEMENTS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}

THREADS = 256  # of a block; to be measured
WARP = 32
OCTET = 8  # elements a thread takes at a time
VECTOR_BYTES = 16
NODE_BYTES = 16
WIDE_CHANNELS = 8  # bytes of neighbouring channels that a thread of reduce_channels owns
CLUSTERS = (1, 2, 4, 8)  # blocks that share a slab; more than 8 are not portable
CLUSTER_CAPABILITY = (9, 0)
WAVES = 4  # blocks per multiprocessor and more: enough to hide latency and even out the end; to be measured

Fields = Mapping[str, int | float]
"""Members of kernels/parameters.cuh's `Parameters`, by name."""

Layout = Literal["nchw", "nhwc", "strided"]

What = Literal["Moments", "Sums"]
"""What a reduction is of: x, or a gradient."""


@dataclass(frozen=True)
class Limits:
    """What a device can do."""

    multiprocessors: int
    shared_bytes: int  # of a block that asks for it
    capability: tuple[int, int]
    l2_bytes: int = 0
    cluster: int = CLUSTERS[-1]  # blocks of the largest cluster it holds, where the capability has any

    @property
    def clusters(self) -> tuple[int, ...]:
        """Sizes of the clusters it holds, whatever a block uses."""
        most = self.cluster if self.capability >= CLUSTER_CAPABILITY else 1
        return tuple(size for size in CLUSTERS if size <= most)


@dataclass(frozen=True)
class Launch:
    """One kernel launch but for the addresses."""

    kernel: str
    options: tuple[str, ...]
    grid: int
    shared_bytes: int
    fields: tuple[tuple[str, int | float], ...]
    file: str = ""  # kernels/<file>.cu, where it is not the kernel's own name
    octets: str = ""  # begin rows of positions ("nchw") or of channels ("nhwc"), or nothing but the array ("linear")
    threads: int = THREADS
    cluster: int = 1

    @property
    def source(self) -> str:
        return self.file or self.kernel


def acc_of(dtype: str) -> str:
    """The C++ type that values of a dtype are widened to."""
    return "double" if dtype == "float64" else "float"


def option(**names: object) -> tuple[str, ...]:
    return tuple(f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in names.items())


Options = NormalizeOptions | GradientOptions | CombineOptions

_GATES: dict[ReluGradient, str] = {"none": "GATE_NONE", "recompute": "GATE_RECOMPUTE", "mask": "GATE_BITS"}


def flags(options: Options) -> tuple[str, ...]:
    """A pass over all elements, as the compiler is told; see kernels/elementwise.cuh."""
    if isinstance(options, NormalizeOptions):
        residual, relu, keep_mask = options.residual, options.relu, options.keep_mask
        return option(OPERATION="NORMALIZE", RESIDUAL=residual, RELU=relu, KEEP_BITS=keep_mask)
    gate = _GATES[options.relu]
    if isinstance(options, CombineOptions):
        return option(OPERATION="COMBINE", GATE=gate, THIRD=options.third.upper())
    return option(OPERATION="GRADIENT", RESIDUAL=options.residual, GATE=gate, FROZEN=options.frozen)


def read_twice(options: Options) -> int:
    """Operands that a training step or gradient reads twice: x, and dy."""
    return 1 if isinstance(options, NormalizeOptions) else 2


def has_relu_mask(options: Options) -> bool:
    """Whether a relu mask is written or read."""
    return options.keep_mask if isinstance(options, NormalizeOptions) else options.relu == "mask"


def reduction_flags(what: What, relu: ReluGradient) -> tuple[str, ...]:
    """A reduction, in the same way."""
    return option(KIND=what, GATE=_GATES[relu])


def given(operands: Operands) -> list[Operand]:
    """Those that are there, but for the mask."""
    return [o for o in operands[:-1] if o is not None]


def sizes(extents: Extents) -> Fields:
    return {"samples": extents.N, "channels": extents.C, "positions": extents.S}


def power_above(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


def power_below(n: int) -> int:
    """The greatest power of two that is n or less."""
    return 1 << (n.bit_length() - 1)
