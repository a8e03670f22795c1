"""What the operations ask of a device.

An operation validates and describes its arguments, then hands a backend nothing but layouts, addresses, numbers and the
backend's own arrays. A backend validates nothing and knows nothing of array libraries. It returns numbers and *backend
arrays*: NumPy arrays on the CPU, CuPy arrays on CUDA.

Operations that networks call at every step are *prepared*: all that follows from layouts and options is worked out
once, and the prepared call then takes addresses alone, 0 for what is absent.

The arithmetic every backend must reproduce to the bit is stated in docs/numerics.md and, executably, in
`cubn/reference.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cubn._types import (
    Affine,
    BackendArray,
    CombineOptions,
    Counters,
    Extents,
    GradientOptions,
    Nodes,
    NormalizeOptions,
    Operands,
    Renormalised,
    Running,
    Statistics,
    StatisticsT,
    Update,
    Vector,
)

if TYPE_CHECKING:
    from cubn.backends.cuda.device import Device

ReluMask = Any
"""Which y passed a residual ReLU, one bit an element, packed as suits the backend."""

Sums = tuple[BackendArray, BackendArray]
"""(sum_dy, sum_dy_xmu), each (C,)."""


class PreparedForward(Protocol):
    """Inference, but for addresses."""

    def __call__(
        self, x: int, residual: int, y: int, mask: int, gamma: int, beta: int, mean: int, var: int, eps: float, /
    ) -> None:
        """Write y."""


class PreparedTrain(Protocol):
    """A training step on a whole batch, but for addresses."""

    def __call__(
        self,
        x: int,
        residual: int,
        y: int,
        mask: int,
        gamma: int,
        beta: int,
        eps: float,
        old_mean: int = 0,
        old_var: int = 0,
        new_mean: int = 0,
        new_var: int = 0,
        tracked: int = 0,
        skipped: int = 0,
        momentum: float | None = 0.0,
        /,
    ) -> tuple[Statistics, ReluMask | None]:
        """Write y and, where they were prepared for, the running statistics and their counters."""


class PreparedBackward(Protocol):
    """The gradients of a whole batch, but for addresses."""

    def __call__(
        self,
        x: int,
        dy: int,
        dx: int,
        dresidual: int,
        mask: int,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        dgamma: int,
        dbeta: int,
        wants_sums: bool = False,
        /,
    ) -> Sums | None:
        """Write dx, dresidual, dgamma and dbeta, those that were prepared for."""


class PreparedNormalize(Protocol):
    """A pass that normalises by given statistics, but for addresses."""

    def __call__(
        self, x: int, residual: int, y: int, mask: int, statistics: Statistics, gamma: int, beta: int, /
    ) -> ReluMask | None:
        """Write y."""


class PreparedFrozen(Protocol):
    """A pass that normalises by running statistics and has a backward, but for addresses."""

    def __call__(
        self, x: int, residual: int, y: int, mask: int, gamma: int, beta: int, mean: int, var: int, eps: float, /
    ) -> tuple[Statistics, ReluMask | None]:
        """Write y."""


class PreparedMoments(Protocol):
    """Nodes of a range of samples, but for addresses."""

    def __call__(self, x: int, mask: int, /) -> Nodes:
        """See `Backend.moments`."""


class PreparedUpdate(Protocol):
    """An update of running statistics, but for addresses."""

    def __call__(
        self,
        statistics: Statistics,
        old_mean: int,
        old_var: int,
        new_mean: int,
        new_var: int,
        tracked: int,
        skipped: int,
        momentum: float | None,
        /,
    ) -> None:
        """See `Backend.update`."""


class Backend(Protocol):
    """Every method works on the caller's current stream and returns at once or done. What is given to `prepare_...` are
    layouts: only a pointer's remainder by 16 may be looked at.
    """

    name: str

    @property
    def device(self) -> Device | None:
        """The device; None for the host's memory."""

    # --- arrays -------------------------------------------------------------------------------------------------------

    def to_host(self, array: BackendArray, out: Any = None) -> Any:
        """A copy in NumPy of one of the backend's arrays."""

    def from_host(self, array: Any) -> BackendArray:
        """A backend array of a NumPy array's values."""

    def staging(self, shape: tuple[int, ...]) -> Any:
        """A NumPy array of float64 for what is on its way from the backend's arrays, or to them."""

    def address(self, array: BackendArray) -> int:
        """Where an array's first element is."""

    def apart(self, array: BackendArray, statistics: Statistics) -> Any:
        """A part of statistics, or of their relu mask, for the caller: a copy, or on a device an array that the library
        which the backend is for orders as its own.
        """

    def place_statistics(self, memory: Any, C: int, *, gamma: bool = False, beta: bool = False) -> Statistics:
        """Statistics that the host has written, in NumPy."""

    def statistics_on_host(self, statistics: Statistics) -> Statistics:
        """A copy in NumPy."""

    def new_statistics(self, C: int, affine: Affine) -> Statistics:
        """Statistics that are still to be written, with copies of gamma and beta where there are any."""

    def new_renormalised(self, C: int, affine: Affine) -> Renormalised:
        """The same, with room for r and d."""

    # --- whole batches ------------------------------------------------------------------------------------------------

    def prepare_forward(
        self, extents: Extents, operands: Operands, affine: Affine, running: Running, options: NormalizeOptions
    ) -> PreparedForward:
        """`frozen_statistics`, then `normalize`."""

    def prepare_train(
        self,
        extents: Extents,
        operands: Operands,
        affine: Affine,
        running: Running | None,
        biased: bool,
        options: NormalizeOptions,
    ) -> PreparedTrain:
        """`moments`, `root`, `statistics`, `normalize` and, with running statistics, `update` of a batch that starts at
        sample 0; fused where it fits. What is running becomes new vectors of the same layout, or is updated in place.
        """

    def prepare_backward(
        self,
        extents: Extents,
        operands: Operands,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        parameters: tuple[Vector, Vector] | None,
        options: GradientOptions,
    ) -> PreparedBackward:
        """`backward_sums`, `root_sums`, `backward_apply` and, into dgamma and dbeta, `parameter_gradients`; fused where
        it fits. Of statistics and relu mask it looks at the layout.
        """

    def prepare_normalize(
        self, extents: Extents, operands: Operands, affine: Affine, options: NormalizeOptions
    ) -> PreparedNormalize:
        """`normalize`."""

    def prepare_frozen(
        self, extents: Extents, operands: Operands, affine: Affine, running: Running, options: NormalizeOptions
    ) -> PreparedFrozen:
        """`keep`, `frozen_statistics` and `normalize`."""

    def prepare_moments(self, extents: Extents, operands: Operands, start: int) -> PreparedMoments:
        """`moments`."""

    def prepare_update(self, C: int, old: Running, new: Running, biased: bool) -> PreparedUpdate:
        """`update`."""

    # --- parts of batches ---------------------------------------------------------------------------------------------

    def keep(self, affine: Affine, statistics: Statistics) -> None:
        """Copy gamma and beta, where there are any, into the statistics."""

    def moments(self, extents: Extents, operands: Operands, start: int) -> Nodes:
        """Nodes (count, mean, m2) of samples [start, start + N) of x where the mask is True; of count 0, or none, with
        N = 0 or S = 0.
        """

    def root(self, nodes: Nodes) -> tuple[BackendArray, BackendArray, BackendArray]:
        """(count (), mean (C,), m2 (C,)) of neighbouring nodes of `moments` together; zeros of none.

        The nodes' table may be used up.
        """

    def root_sums(self, nodes: Nodes) -> Sums:
        """(sum_dy (C,), sum_dy_xmu (C,)) of neighbouring nodes of `backward_sums` together, in the same way."""

    def statistics(
        self, count: BackendArray, mean: BackendArray, m2: BackendArray, eps: float, into: StatisticsT
    ) -> StatisticsT:
        """count, mean, m2, var = m2 / count and invstd = 1 / sqrt(var + eps), in float64. What they were written into:
        that, or where it is another stream's, new ones with the same copies of gamma and beta.
        """

    def frozen_statistics(self, running: Running, eps: float, into: Statistics) -> None:
        """The same from running statistics, widened to float64; count is 0 and m2 has no meaning."""

    def renormalise(self, found: Renormalised, before: Statistics, r_max: float, d_max: float) -> Renormalised:
        """r and d of a batch beside running statistics, and what takes the place of the copies of gamma and beta."""

    def given_statistics(self, C: int, count: int, mean: Vector, invstd: Vector, affine: Affine) -> Statistics:
        """Statistics that somebody else took, and copies of gamma and beta: all that a backward reads."""

    def normalize(
        self, extents: Extents, operands: Operands, statistics: Statistics, affine: Affine, options: NormalizeOptions
    ) -> ReluMask | None:
        """y = relu((x - mean) * invstd * gamma + beta + g), g being the residual; on demand, which y are > 0 or NaN."""

    def update(self, statistics: Statistics, old: Running, new: Running, counters: Counters, update: Update) -> None:
        """Running mean and variance `old` -> `new`, which may be the same, with the guard and both counters."""

    def backward_sums(
        self,
        extents: Extents,
        operands: Operands,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        options: GradientOptions,
        start: int,
    ) -> Nodes:
        """Nodes (count, sum of g, sum of g * (x - mean)) of samples [start, start + N), g being dy behind its ReLU."""

    def backward_apply(
        self,
        extents: Extents,
        operands: Operands,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        sums: Sums | None,
        options: GradientOptions | CombineOptions,
    ) -> None:
        """y, here dx, and r, here dresidual (the gated dy), from the global sums; with frozen statistics, which need
        none, dx = dy * scale. Or a combination, whose k1 and k2 are computed of the sums like those of dx.
        """

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        """dgamma = sum_dy_xmu * invstd and dbeta = sum_dy, each rounded once to its vector's dtype; of renormalised
        statistics dgamma = r * (sum_dy_xmu * invstd) + d * sum_dy.
        """
