"""The prepared calls: what networks do at every step, but for addresses and numbers."""

from __future__ import annotations

from typing import NamedTuple

from cubn._types import (
    ROWS,
    Affine,
    BackendArray,
    Extents,
    GradientOptions,
    NormalizeOptions,
    Operands,
    Running,
    Statistics,
    StatisticsT,
    Vector,
)
from cubn.backends.cuda import prepare
from cubn.backends.cuda.device import Device
from cubn.backends.cuda.plan import Layout
from cubn.backends.cuda.prepare import OPERANDS, STATISTICS, SUMS, affine_vectors, running_vectors, vector_fields
from cubn.backends.cuda.series import Series
from cubn.backends.protocol import (
    PreparedBackward,
    PreparedForward,
    PreparedNormalize,
    PreparedTrain,
    PreparedUpdate,
    Sums,
)

UPDATE = ("old_mean", "old_var", "new_mean", "new_var", "tracked", "skipped", "momentum", "cumulative")
KEPT = ("kept_gamma", "kept_beta")
GRADIENTS = ("dgamma", "dbeta")


class ReluMask(NamedTuple):
    """Which y passed a residual ReLU, a bit an element in the order of (n, c, p), or of (n, p, c).

    The order is what a backward looks at when it is prepared: it depends on x, residual and y, not on x alone.
    """

    memory: BackendArray
    address: int
    layout: Layout  # "nchw" or "nhwc"


def new_relu_mask(device: Device, extents: Extents, layout: Layout) -> ReluMask:
    N, C, S = extents
    memory = device.empty((-(-N * C * S // 8),), "uint8")
    return ReluMask(memory, device.address(memory), "nhwc" if layout == "nhwc" else "nchw")


def new_statistics(device: Device, C: int, affine: Affine, kind: type[StatisticsT]) -> StatisticsT:
    memory = device.empty((kind.size(C),), "float64")
    has_gamma, has_beta = affine.gamma is not None, affine.beta is not None
    return kind(memory, device.address(memory), C, has_gamma, has_beta, device.stream())


def row_offsets(C: int) -> list[int]:
    """Of the rows of statistics, in bytes: mean, m2, var, invstd, gamma, beta."""
    return [8 * Statistics.offset(name, C) for name in ROWS]


def forward(
    device: Device, extents: Extents, operands: Operands, affine: Affine, running: Running, options: NormalizeOptions
) -> PreparedForward:
    if 0 in extents:
        return _nothing
    dtype = operands.x.dtype
    given = {**affine_vectors(affine), "old_mean": running.mean, "old_var": running.var}
    series = Series((*OPERANDS, "gamma", "beta", "old_mean", "old_var", "eps"))
    prepare.reserve_coefficients(series, extents.C, dtype)
    names = (*given, "eps", "coefficients")
    prepare.channelwise(series, "frozen", extents.C, dtype, names, vector_fields(given))
    prepare.elementwise(series, extents, operands, None, options, device.limits)
    series.compile(device)
    room = (series.numbers,)

    def call(
        x: int, residual: int, y: int, mask: int, gamma: int, beta: int, mean: int, var: int, eps: float, /
    ) -> None:
        memory = device.empty(room, "float64")
        coefficients = device.address(memory)
        values = (x, residual, y, 0, mask, gamma, beta, mean, var, eps, coefficients)
        series.run(device, values, device.stream())

    return call


def _nothing(*_: float) -> None:
    """Of an empty batch."""


def train(
    device: Device,
    extents: Extents,
    operands: Operands,
    affine: Affine,
    running: Running | None,
    biased: bool,
    options: NormalizeOptions,
) -> PreparedTrain:
    C, limits = extents.C, device.limits
    given = affine_vectors(affine)
    moved = running_vectors(running, running) if running else {}
    movement = {**vector_fields(moved), "ddof": int(not biased)}
    update = UPDATE if running else ()
    known = vector_fields(given)
    names = ("eps", *STATISTICS, *given, *[f"kept_{name}" for name in given])
    series = Series((*OPERANDS, "gamma", "beta", "eps", *UPDATE, *STATISTICS, *KEPT, "bits"))
    layout = prepare.in_one(series, extents, operands, None, options, limits, (*names, *update), {**known, **movement})
    if layout is None:
        dtype = operands.x.dtype
        prepare.reserve_coefficients(series, C, dtype)
        read = Operands(operands.x, mask=operands.mask)
        rows = prepare.rows(series, "Moments", extents, read, "none", None, limits)
        prepare.finish(series, "Moments", C, dtype, rows, names, known)
        if 0 not in extents:
            layout = prepare.elementwise(series, extents, operands, None, options, limits)
        if running:  # last: an error on the way leaves the state as it was
            prepare.channelwise(series, "update", C, "float32", (*STATISTICS, *update), movement)
    series.compile(device)
    mask_layout = layout if options.keep_mask else None
    zeros = series.begins_at_zero or extents.N * extents.S == 0
    room, new = (series.numbers,), device.zeros if zeros else device.empty
    size, has_room = (Statistics.size(C),), series.numbers > 0
    has_gamma, has_beta = affine.gamma is not None, affine.beta is not None
    mean, m2, var, invstd, copy, other = row_offsets(C)

    def call(
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
        found = device.empty(size, "float64")
        at = device.address(found)
        kept = new_relu_mask(device, extents, mask_layout) if mask_layout else None
        given = (x, residual, y, 0, mask, gamma, beta, eps)
        moved = (old_mean, old_var, new_mean, new_var, tracked, skipped, momentum or 0.0, momentum is None)
        rows = (at, at + mean, at + m2, at + var, at + invstd, at + copy, at + other, kept.address if kept else 0)
        memory = new(room, "float64") if has_room else None  # held until all is launched
        parts = series.parts(device.address(memory)) if has_room else ()
        stream = device.stream()
        series.run(device, given + moved + rows + parts, stream)
        return Statistics(found, at, C, has_gamma, has_beta, stream), kept

    return call


def backward(
    device: Device,
    extents: Extents,
    operands: Operands,
    copies: Affine,
    relu_mask: Layout | None,
    parameters: tuple[Vector, Vector] | None,
    options: GradientOptions,
) -> PreparedBackward:
    C, limits = extents.C, device.limits
    gradients = dict(zip(GRADIENTS, parameters, strict=True)) if parameters else {}
    known, given = vector_fields(gradients), affine_vectors(copies)
    series = Series((*OPERANDS, *GRADIENTS, *STATISTICS, "gamma", "beta", "bits"))
    series.reserve("first", C)
    second = series.reserve("second", C)
    names = (*STATISTICS, *SUMS, *gradients)
    affine = vector_fields(given)
    if (
        prepare.in_one(series, extents, operands, relu_mask, options, limits, (*names, *given), {**known, **affine})
        is None
    ):
        dtype = operands.x.dtype
        prepare.reserve_coefficients(series, C, dtype)
        prepare.channelwise(series, "coefficients", C, dtype, (*STATISTICS, *given, "coefficients"), affine)
        rows = prepare.rows(series, "Sums", extents, operands, options.relu, relu_mask, limits)
        prepare.finish(series, "Sums", C, dtype, rows, names, known)
        if 0 not in extents:
            prepare.elementwise(series, extents, operands, relu_mask, options, limits)
    series.compile(device)
    zeros = series.begins_at_zero or extents.N * extents.S == 0
    room, new = (series.numbers,), device.zeros if zeros else device.empty
    mean, m2, var, invstd, gamma, beta = row_offsets(C)

    def call(
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
        memory = new(room, "float64")
        at = statistics.address
        given = (x, dy, dx, dresidual, mask, dgamma, dbeta)
        bits = relu_mask.address if relu_mask else 0
        rows = (at, at + mean, at + m2, at + var, at + invstd, at + gamma, at + beta, bits)
        values = given + rows + series.parts(device.address(memory))
        series.run_behind(device, values, device.stream(), statistics.stream, statistics.memory, relu_mask)
        return (memory[:C], memory[second : second + C]) if wants_sums else None

    return call


def normalize(device: Device, series: Series, extents: Extents, mask_layout: Layout | None) -> PreparedNormalize:
    """A pass of `parts.elementwise`; with a layout of the relu mask it is to keep."""
    mean, m2, var, invstd, *_ = row_offsets(extents.C)
    room = (series.numbers,)

    def call(
        x: int, residual: int, y: int, mask: int, statistics: Statistics, gamma: int, beta: int, /
    ) -> ReluMask | None:
        kept = new_relu_mask(device, extents, mask_layout) if mask_layout else None
        memory = device.empty(room, "float64")
        at = statistics.address
        rows = (at, at + mean, at + m2, at + var, at + invstd, kept.address if kept else 0, 0, 0)
        values = (x, residual, y, 0, mask, gamma, beta, *rows, *series.parts(device.address(memory)))
        series.run_behind(device, values, device.stream(), statistics.stream, statistics.memory)
        return kept

    return call


def normalize_nothing(*_: object) -> None:
    """Of an empty batch."""


OF_UPDATE = (*STATISTICS, "tracked", "skipped", "momentum", "cumulative", "ddof")


def update(device: Device, series: Series, biased: bool) -> PreparedUpdate:
    """A series that takes the four vectors, then what `OF_UPDATE` names."""
    series.compile(device)

    def call(
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
        rows = (statistics.at(name) for name in STATISTICS)
        how = (momentum or 0.0, momentum is None, int(not biased))
        values = (old_mean, old_var, new_mean, new_var, *rows, tracked, skipped, *how)
        series.run_behind(device, values, device.stream(), statistics.stream, statistics.memory)

    return call
