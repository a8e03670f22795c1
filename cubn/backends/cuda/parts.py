"""The series of what is done to parts of batches: passes, nodes of the tree, roots, and single arrays of a channel."""

from __future__ import annotations

from cubn._types import Affine, Extents, Operands, ReluGradient, Vector
from cubn.backends.cuda import plan, prepare
from cubn.backends.cuda.plan import Layout, Limits, Options, What
from cubn.backends.cuda.prepare import NODE, OPERANDS, STATISTICS, SUMS, affine_vectors, vector_fields
from cubn.backends.cuda.series import Series

PASS = (*OPERANDS, "gamma", "beta", *STATISTICS, "bits", *SUMS)
"""The values of `elementwise`."""

REDUCTION = (*OPERANDS, "gamma", "beta", *STATISTICS, "bits", "bits_first", *NODE)
"""The values of `node`: of the operands, and where the node goes."""


def elementwise(
    limits: Limits,
    extents: Extents,
    operands: Operands,
    affine: Affine,
    relu_mask: Layout | None,
    sums: bool,
    options: Options,
) -> tuple[Series, Layout]:
    """Normalise or, with sums unless the statistics are frozen, the input gradient; how a kept mask has its bits."""
    series = Series(PASS)
    _coefficients(series, extents.C, operands.x.dtype, affine)
    if sums:
        names = ("count", "invstd", *SUMS, "coefficients")
        prepare.channelwise(series, "gradient_coefficients", extents.C, operands.x.dtype, names, {})
    return series, prepare.elementwise(series, extents, operands, relu_mask, options, limits)


def node(
    limits: Limits,
    what: What,
    extents: Extents,
    operands: Operands,
    affine: Affine,
    relu: ReluGradient,
    relu_mask: Layout | None,
) -> Series:
    """The node of an aligned block of samples that has values."""
    series = Series(REDUCTION)
    if what == "Sums":
        _coefficients(series, extents.C, operands.x.dtype, affine)
    rows = prepare.rows(series, what, extents, operands, relu, relu_mask, limits)
    one = plan.merge_rows(extents.C, what, rows.number, rows.number)
    prepare.merge(series, one, rows, prepare.Rows(1, NODE))
    return series


def _coefficients(series: Series, C: int, dtype: str, affine: Affine) -> None:
    given = affine_vectors(affine)
    prepare.reserve_coefficients(series, C, dtype)
    prepare.channelwise(series, "coefficients", C, dtype, (*STATISTICS, *given, "coefficients"), vector_fields(given))


def root(C: int, what: What, order: tuple[int, ...]) -> Series:
    """All nodes of a table into one."""
    values = ("table", "table_step", "merges", "count", *SUMS)
    series = Series(values)
    series.add(plan.root(C, what, order), values)
    return series


def per_channel(kernel: str, C: int, vectors: tuple[tuple[str, Vector], ...], numbers: tuple[str, ...]) -> Series:
    """A kernel with a thread for every channel: its values are the vectors' addresses, and others."""
    given = dict(vectors)
    values = (*given, *numbers)
    series = Series(values)
    prepare.channelwise(series, kernel, C, "float32", values, vector_fields(given))
    return series
