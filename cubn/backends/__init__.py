"""The narrow protocol between the operations and the code that does the arithmetic.

An operation (`cubn/forward.py`, `backward.py`, `moments.py`) validates and describes its arguments, then hands a
backend nothing but `Operand`, `Vector`, numbers and its own arrays. A backend validates nothing and knows nothing of
array libraries. It returns numbers and *backend arrays*: NumPy arrays on the CPU, CuPy arrays on CUDA.

The arithmetic every backend must reproduce to the bit is stated in docs/numerics.md and, executably, in
`cubn/reference.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cubn.errors import BackendUnavailable

if TYPE_CHECKING:
    from cubn.backends.cuda.device import Device

CPU, CUDA = 1, 2  # DLPack device types

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1}  # bytes of an element

BackendArray = Any
"""An array of the backend's own library, dense and C-contiguous."""


class Operand(NamedTuple):
    """One array as a kernel sees it: N samples x C channels x S positions (C order of the logical shape).

    Strides are in elements. Axes of the position that step as one are collapsed; a dense array has one position axis.
    """

    pointer: int
    dtype: str
    sample_stride: int
    channel_stride: int
    position_shape: tuple[int, ...]
    position_strides: tuple[int, ...]


class Extents(NamedTuple):
    """Samples, channels, positions in a sample."""

    N: int
    C: int
    S: int


class Vector(NamedTuple):
    """A per-channel array of any library: C elements, `stride` elements apart."""

    pointer: int
    dtype: str
    stride: int


class Arrays(NamedTuple):
    """What an operation reads and writes element by element, all of the same extents."""

    x: Operand
    g: Operand | None = None  # read along with x: residual, or dy
    y: Operand | None = None  # written: y, or dx
    r: Operand | None = None  # written along with it: dresidual
    mask: Operand | None = None  # of bool


class Affine(NamedTuple):
    """Scale and shift of each channel, where there are any."""

    gamma: Vector | None
    beta: Vector | None


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


class Statistics(NamedTuple):
    """What normalisation needs: count (a number, as an int64 array of shape ()), and float64 (C,) mean, m2, var,
    invstd.
    """

    count: BackendArray
    mean: BackendArray
    m2: BackendArray
    var: BackendArray
    invstd: BackendArray


class Running(NamedTuple):
    """Running statistics that are to move."""

    old: tuple[Vector, Vector]  # mean and variance
    new: tuple[Vector, Vector]  # where they go, which may be the same memory
    tracked: BackendArray  # int64 (C,) counters
    skipped: BackendArray
    momentum: float | None  # weight of the new value; None for the cumulative average
    biased: bool = False  # running_var averages m2 / count instead of m2 / (count - 1)

    @property
    def in_place(self) -> bool:
        """Whether what there was is gone once they have moved."""
        return self.new == self.old


class Gate(NamedTuple):
    """The ReLU between y and dy.

    kind "none": there was none. "recompute": dy is 0 where y, recomputed from x and rounded to its dtype, is <= 0.
    "bits": as kept in `bits`, the backend array `Backend.normalize` or `train` returned for a residual ReLU.
    """

    kind: str
    bits: BackendArray | None = None


class Backend(Protocol):
    """What the operations ask of a device. Every method works on the caller's current stream and returns at once or
    done.
    """

    name: str

    @property
    def device(self) -> Device | None:
        """The device; None for the host's memory."""

    def to_host(self, array: BackendArray, out: Any = None) -> Any:
        """A copy in NumPy of one of the backend's arrays."""

    def from_host(self, array: Any) -> BackendArray:
        """A backend array of a NumPy array's values."""

    def staging(self, shape: tuple[int, ...]) -> Any:
        """A NumPy array of float64 for what is on its way from the backend's arrays, or to them."""

    def new_vector(self, C: int) -> tuple[BackendArray, Vector]:
        """A float64 per-channel array that is still to be written, and the same as a kernel sees it."""

    def keep(self, affine: Affine, kept: Affine, C: int) -> None:
        """Copy gamma and beta, where there are any, into vectors of `new_vector`."""

    def moments(self, extents: Extents, arrays: Arrays, start: int) -> Nodes:
        """Nodes (count, mean, m2) of samples [start, start + N) of x where the mask is True; of count 0, or none, with
        N = 0 or S = 0.
        """

    def root(self, nodes: Nodes) -> tuple[BackendArray, BackendArray, BackendArray]:
        """(count (), mean (C,), m2 (C,)) of neighbouring nodes of `moments` together; zeros of none.

        The nodes' table may be used up.
        """

    def root_sums(self, nodes: Nodes) -> tuple[BackendArray, BackendArray]:
        """(sum_dy (C,), sum_dy_xmu (C,)) of neighbouring nodes of `backward_sums` together, in the same way."""

    def statistics(self, count: BackendArray, mean: BackendArray, m2: BackendArray, eps: float) -> Statistics:
        """var = m2 / count and invstd = 1 / sqrt(var + eps), in float64."""

    def frozen_statistics(self, running: tuple[Vector, Vector], C: int, eps: float) -> Statistics:
        """The same from running statistics, widened to float64; count is 0 and m2 has no meaning."""

    def normalize(
        self,
        extents: Extents,
        arrays: Arrays,
        statistics: Statistics,
        affine: Affine,
        *,
        relu: bool,
        keep_bits: bool,
    ) -> BackendArray | None:
        """y = relu((x - mean) * invstd * gamma + beta + g), g being the residual; with keep_bits, which y are > 0 or
        NaN, one bit an element.
        """

    def forward(
        self,
        extents: Extents,
        arrays: Arrays,
        running: tuple[Vector, Vector],
        eps: float,
        affine: Affine,
        *,
        relu: bool,
    ) -> None:
        """Inference in one call: `frozen_statistics` then `normalize`, with the least host work."""

    def train(
        self,
        extents: Extents,
        arrays: Arrays,
        eps: float,
        affine: Affine,
        *,
        relu: bool,
        keep_bits: bool,
        kept: Affine | None = None,
        running: Running | None = None,
    ) -> tuple[Statistics, BackendArray | None]:
        """`moments`, `root`, `statistics` and `normalize` over a batch that starts at sample 0 and is whole; `keep` of
        gamma and beta in new vectors `kept`, and `update` of running statistics, where there are any: fused where it
        fits.
        """

    def update(self, statistics: Statistics, running: Running) -> None:
        """Running mean and variance `old` -> `new`, with the guard and both counters."""

    def backward_sums(
        self,
        extents: Extents,
        arrays: Arrays,
        statistics: Statistics,
        affine: Affine,
        *,
        gate: Gate,
        start: int,
    ) -> Nodes:
        """Nodes (count, sum of g, sum of g * (x - mean)) of samples [start, start + N), g being dy behind its gate."""

    def backward_apply(
        self,
        extents: Extents,
        arrays: Arrays,
        statistics: Statistics,
        affine: Affine,
        sums: tuple[BackendArray, BackendArray] | None,
        *,
        gate: Gate,
    ) -> None:
        """y, here dx, and r, here dresidual (the gated dy), from the global sums; with `sums` None the statistics were
        frozen: dx = dy * scale.
        """

    def backward(
        self,
        extents: Extents,
        arrays: Arrays,
        statistics: Statistics,
        affine: Affine,
        *,
        frozen: bool,
        gate: Gate,
        parameters: tuple[Vector, Vector] | None = None,
    ) -> tuple[BackendArray, BackendArray]:
        """`backward_sums`, `root_sums`, `backward_apply` and, into dgamma and dbeta, `parameter_gradients` of a whole
        batch, fused where it fits; returns the sums.
        """

    def parameter_gradients(
        self,
        statistics: Statistics,
        sums: tuple[BackendArray, BackendArray],
        dgamma: Vector,
        dbeta: Vector,
    ) -> None:
        """dgamma = sum_dy_xmu * invstd and dbeta = sum_dy, each rounded once to its vector's dtype."""


def backend_for(device: tuple[int, int], library: str = "") -> Backend:
    """The backend of a DLPack device (type, index), for arrays of one library: CUDA work goes to that library's stream.

    Raises
    ------
    ImportError
        If what the backend is made with is not installed.
    BackendUnavailable
        If it is, and does not work here.
    """
    kind, index = device
    if kind == CPU:
        from cubn.backends import cpu

        return cpu.backend()
    if kind == CUDA:
        from cubn.backends import cuda

        return cuda.backend(index, library)
    raise BackendUnavailable(f"cubn: there is no backend for DLPack device type {kind}. Move the arrays to the CPU")
