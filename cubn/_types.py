"""What operations and backends tell each other: arrays as kernels see them, and options. Numbers and addresses only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

CPU, CUDA = 1, 2  # DLPack device types
HOST = (CPU, 0)


class DType(NamedTuple):
    """An element type."""

    code: int  # DLPack's
    bits: int
    vector_code: int = 0  # by which kernels know the type of a per-channel array; 0: they read none of this type

    @property
    def itemsize(self) -> int:
        return self.bits // 8


DTYPES = {
    "float16": DType(2, 16, 1),
    "bfloat16": DType(4, 16, 2),
    "float32": DType(2, 32, 3),
    "float64": DType(2, 64, 4),
    "bool": DType(6, 8),
    **{f"int{bits}": DType(0, bits) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": DType(1, bits) for bits in (8, 16, 32, 64)},
}
"""The dtypes cubn works with, by name."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
BOOL = ("bool",)
COUNTS = ("int32", "int64")
NUMBERS = tuple(DTYPES)
ITEMSIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}
VECTOR_CODES = {name: DTYPES[name].vector_code for name in FLOATS}

BackendArray = Any
"""An array of the backend's own library, dense and C-contiguous: NumPy's on the CPU, CuPy's on CUDA."""


class Extents(NamedTuple):
    """Samples, channels, positions in a sample."""

    N: int
    C: int
    S: int


class Operand(NamedTuple):
    """One array as a kernel sees it: N samples x C channels x S positions (C order of the logical shape).

    Strides are in elements. Axes of the position that step as one are collapsed; a dense array has one position axis.
    Without its pointer it is a layout: what a launch is prepared for.
    """

    pointer: int
    dtype: str
    sample_stride: int
    channel_stride: int
    position_shape: tuple[int, ...]
    position_strides: tuple[int, ...]


class Operands(NamedTuple):
    """What an operation reads and writes element by element, all of the same extents."""

    x: Operand
    g: Operand | None = None  # read along with x: residual, or dy
    y: Operand | None = None  # written: y, or dx
    r: Operand | None = None  # written along with it: dresidual; of a combination, read: what is added
    mask: Operand | None = None  # of bool


class Vector(NamedTuple):
    """A per-channel array of any library: C elements, `stride` elements apart."""

    pointer: int
    dtype: str
    stride: int


class Affine(NamedTuple):
    """Scale and shift of each channel, where there are any."""

    gamma: Vector | None
    beta: Vector | None


class Running(NamedTuple):
    """Running statistics of each channel."""

    mean: Vector
    var: Vector


class Counters(NamedTuple):
    """Addresses of int64 (C,) counters of the updates of running statistics."""

    tracked: int
    skipped: int


class Update(NamedTuple):
    """How running statistics move."""

    momentum: float | None  # weight of the new value; None for the cumulative average
    biased: bool  # running_var averages m2 / count instead of m2 / (count - 1)


LANE = 16
"""Float64 numbers in 128 bytes, a cache line and its neighbour that is fetched along."""


ROWS = ("mean", "m2", "var", "invstd", "gamma", "beta")


class Statistics(NamedTuple):
    """What normalisation needs and a backward reads, of C channels: count, mean, m2, var, invstd, and copies of gamma
    and beta where there are any. Float64 rows in one allocation, padded to multiples of 128 bytes.
    """

    memory: BackendArray
    address: int
    C: int
    gamma: bool
    beta: bool
    stream: Any = None
    """Of a device, where they are from and were written; None where the library of the memory orders its use."""

    @staticmethod
    def size(C: int) -> int:
        """Float64 numbers of the allocation."""
        return LANE + len(ROWS) * _padded(C)

    @staticmethod
    def offset(name: str, C: int) -> int:
        """Where a row begins, in numbers; that of the count is 0."""
        return 0 if name == "count" else LANE + ROWS.index(name) * _padded(C)

    @property
    def count(self) -> BackendArray:
        """Values per channel: an int64 array of shape ()."""
        return self.memory[:1].view("int64").reshape(())

    @property
    def mean(self) -> BackendArray:
        return self.row("mean")

    @property
    def m2(self) -> BackendArray:
        return self.row("m2")

    @property
    def var(self) -> BackendArray:
        return self.row("var")

    @property
    def invstd(self) -> BackendArray:
        return self.row("invstd")

    @property
    def affine(self) -> Affine:
        """The copies of gamma and beta."""
        return Affine(self.vector("gamma") if self.gamma else None, self.vector("beta") if self.beta else None)

    def row(self, name: str) -> BackendArray:
        """A row of the memory, float64 (C,)."""
        begin = self.offset(name, self.C)
        return self.memory[begin : begin + self.C]

    def at(self, name: str) -> int:
        """The address of a row, or of the count."""
        return self.address + 8 * self.offset(name, self.C)

    def vector(self, name: str) -> Vector:
        """A row, as kernels read a caller's vector."""
        return Vector(self.at(name), "float64", 1)


class Renormalised(Statistics):
    """Statistics with rows r and d behind the others. Once these are there, what takes the place of gamma and beta is
    gamma * r and beta + gamma * d.
    """

    __slots__ = ()

    @staticmethod
    def size(C: int) -> int:
        return Statistics.size(C) + 2 * _padded(C)

    @staticmethod
    def offset(name: str, C: int) -> int:
        if name in ("r", "d"):
            return Statistics.size(C) + (name == "d") * _padded(C)
        return Statistics.offset(name, C)

    @property
    def r(self) -> BackendArray:
        return self.row("r")

    @property
    def d(self) -> BackendArray:
        return self.row("d")


StatisticsT = TypeVar("StatisticsT", bound=Statistics)


def _padded(C: int) -> int:
    """Numbers of a row."""
    return -(-C // LANE) * LANE


class Nodes(NamedTuple):
    """Nodes of the canonical tree, one per maximal aligned power-of-two block of samples, left to right.

    Row i of the table covers global samples `blocks[i] = (lo, hi)`. The table is float64, (len(blocks), 2 C + 1), its
    rows dense, and a node is what travels between ranks: 16 C + 8 bytes.
    """

    blocks: tuple[tuple[int, int], ...]
    table: BackendArray

    @property
    def count(self) -> BackendArray:
        """Values of *one* channel (a mask has no channel axis, so all channels share it): the table's first column,
        which is of int64.
        """
        return self.table[:, 0].view("int64")

    @property
    def first(self) -> BackendArray:
        """(rows, C): the mean of `Backend.moments`, sum_dy of `Backend.backward_sums`."""
        return self.table[:, 1 : self.table.shape[1] // 2 + 1]

    @property
    def second(self) -> BackendArray:
        """(rows, C): m2 of `Backend.moments`, sum_dy_xmu of `Backend.backward_sums`."""
        return self.table[:, self.table.shape[1] // 2 + 1 :]


@dataclass(frozen=True)
class NormalizeOptions:
    """How a pass that normalises is specialised: y = relu(x * scale + shift + residual)."""

    residual: bool
    relu: bool
    keep_mask: bool = False
    """Whether it is written down which y are positive or NaN, for a backward: behind a residual and a ReLU."""


ReluGradient = Literal["none", "recompute", "mask"]
"""How a backward knows where dy passes: everywhere; where y, recomputed from x and rounded to its dtype, is not <= 0;
where the kept relu mask says so.
"""


@dataclass(frozen=True)
class GradientOptions:
    """How a pass that computes dx is specialised."""

    relu: ReluGradient
    frozen: bool
    """Whether the statistics were given, so that dx = dy * scale."""
    residual: bool
    """Whether dresidual, the gated dy, is written too."""


Third = Literal["none", "added", "weighted"]
"""Whether a combination has a third array, and whether that has a coefficient."""


@dataclass(frozen=True)
class CombineOptions:
    """How a pass that combines arrays is specialised: y = g * scale + (x - mean) * k1 + k2, then + r or + r * beta."""

    relu: ReluGradient
    """Where y is 0, in the end; where that is recomputed, scale and beta are the forward's."""
    third: Third
