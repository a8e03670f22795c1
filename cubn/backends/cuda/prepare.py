"""From plans to launches that lack nothing but the values of a call.

A layout is an operand or vector as it would be at the lowest address that is as far past a multiple of 16 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from cubn._types import ROWS, Affine, Extents, GradientOptions, Operand, Operands, ReluGradient, Running, Vector
from cubn.backends.cuda import plan
from cubn.backends.cuda.parameters import of_operand, of_scattered, of_vector
from cubn.backends.cuda.plan import VECTOR_BYTES, Fields, Launch, Layout, Limits, Options, What
from cubn.backends.cuda.series import Series

STATISTICS = ("count", *ROWS[:4])
OPERANDS = Operands._fields
SUMS = ("first", "second")
NODE = ("node_count", "node_first", "node_second")
SHARED = ("coefficients", "node_first", "node_second", "tickets")
FROM = ("from_count", "from_first", "from_second")


class Rows(NamedTuple):
    """Rows of nodes, and the names of the values that say where their counts, firsts and seconds are."""

    number: int
    names: tuple[str, ...]


# --- layouts ----------------------------------------------------------------------------------------------------------


def layouts(operands: Operands) -> Operands:
    return Operands(*[o and Operand(o.pointer % VECTOR_BYTES, *o[1:]) for o in operands])  # type: ignore[arg-type]


def affine_vectors(affine: Affine) -> dict[str, Vector]:
    """Those that are there, by name."""
    return {name: v for name, v in zip(Affine._fields, affine, strict=True) if v is not None}


def running_vectors(old: Running, new: Running) -> dict[str, Vector]:
    return {"old_mean": old.mean, "old_var": old.var, "new_mean": new.mean, "new_var": new.var}


def vector_fields(given: dict[str, Vector]) -> Fields:
    return {member: value for name, v in given.items() for member, value in of_vector(name, v).items()}


def _operand_fields(launch: Launch, operands: Operands) -> dict[str, int | float]:
    fields: dict[str, int | float] = {}
    for name, o in zip(OPERANDS, operands, strict=True):
        if o is None:
            continue
        if launch.octets:
            fields |= of_operand(name, o, plan.octets_are_vectors(launch, o))
        else:
            fields |= of_scattered(name, o)
    return fields


def _present(operands: Operands) -> list[str]:
    return [name for name, o in zip(OPERANDS, operands, strict=True) if o is not None]


def mask_steps(extents: Extents, layout: Layout) -> tuple[int, int, int]:
    """Bits from one sample, channel and position of a relu mask to the next."""
    _, C, S = extents
    return (C * S, 1, C) if layout == "nhwc" else (C * S, S, 1)


def _mask_fields(extents: Extents, layout: Layout | None) -> Fields:
    if layout is None:
        return {}
    return dict(zip(("bits_sample", "bits_channel", "bits_position"), mask_steps(extents, layout), strict=True))


# --- launches over all elements ---------------------------------------------------------------------------------------


def elementwise(
    series: Series, extents: Extents, operands: Operands, relu_mask: Layout | None, options: Options, limits: Limits
) -> Layout:
    """Normalise or the input gradient; how a mask that is kept has its bits. `relu_mask`: of the one to be read."""
    layout = plan.elementwise_layout(extents, operands, relu_mask)
    launch = plan.elementwise(extents, layout, operands.x.dtype, options, limits)
    _over_elements(series, launch, ("coefficients",), extents, operands, relu_mask or layout, options)
    return layout


def in_one(
    series: Series,
    extents: Extents,
    operands: Operands,
    relu_mask: Layout | None,
    options: Options,
    limits: Limits,
    names: tuple[str, ...],
    fields: Fields,
) -> Layout | None:
    """A whole training step or gradient in one pass over memory, which takes values of these names besides, where there
    is one; how a mask that is kept has its bits.
    """
    launch = plan.on_chip(extents, operands, relu_mask, options, limits)
    if launch is None:
        launch = plan.ticketed(extents, operands, relu_mask, options, limits)
        if launch is None:
            return None
        _reserve_shared(series, launch, extents.C, operands.x.dtype)
        if isinstance(options, GradientOptions):
            channelwise(series, "coefficients", extents.C, operands.x.dtype, (*names, "coefficients"), fields)
        names = (*names, *SHARED)
    layout = plan.layout_of(extents, operands)
    _over_elements(series, launch, names, extents, operands, layout, options, fields)
    return layout


def _reserve_shared(series: Series, launch: Launch, C: int, dtype: str) -> None:
    """What blocks of a ticketed launch have for one another: coefficients, rows of nodes, and counters from 0 on."""
    known = dict(launch.fields)
    rows, groups = int(known["rows"]), int(known["pieces"] // known["rows"])
    reserve_coefficients(series, C, dtype)
    for name, numbers in zip(SHARED[1:], (rows * C, rows * C, groups // 2 + 1), strict=True):  # two counters a number
        series.reserve(name, numbers)
    series.begins_at_zero = True


def _over_elements(
    series: Series,
    launch: Launch,
    names: tuple[str, ...],
    extents: Extents,
    operands: Operands,
    relu_mask: Layout,
    options: Options,
    fields: Fields | None = None,
) -> None:
    known = {**(fields or {}), **_operand_fields(launch, operands)}
    known["dense"] = int(plan.is_dense(launch, extents, operands))
    if plan.has_relu_mask(options):
        known |= _mask_fields(extents, relu_mask)
        names = (*names, "bits")
    series.add(launch, (*_present(operands), *names), known)


# --- reductions -------------------------------------------------------------------------------------------------------


def rows(
    series: Series,
    what: What,
    extents: Extents,
    operands: Operands,
    relu: ReluGradient,
    relu_mask: Layout | None,
    limits: Limits,
) -> Rows:
    """Rows of nodes, few enough for the launch that comes with them, where it finds them."""
    C = extents.C
    if extents.N * extents.S == 0:
        return _new_rows(series, 1, C)  # of zeros
    read = operands._replace(y=None, r=None)
    layout = plan.layout_of(extents, read, relu_mask)
    cut = plan.reduction(extents, layout, what, relu, read.x.dtype, plan.vector_of(extents, read), limits)
    fields = {**_operand_fields(cut.reduce, read), **_mask_fields(extents, relu_mask)}
    names = [*_present(read), *(("bits", "bits_first") if relu_mask else ()), *(("coefficients",) if read.g else ())]
    found = _new_rows(series, cut.rows, C)
    series.add(cut.reduce, names, fields, dict(zip(NODE, found.names, strict=True)))
    for launch, left in cut.merges:
        fewer = _new_rows(series, left, C)
        merge(series, launch, found, fewer)
        found = fewer
    return found


def _new_rows(series: Series, count: int, C: int) -> Rows:
    names = tuple(f"{part} of {count} rows" for part in ("count", "first", "second"))
    for name, numbers in zip(names, (count, count * C, count * C), strict=True):
        series.reserve(name, numbers)
    return Rows(count, names)


def merge(series: Series, launch: Launch, found: Rows, into: Rows) -> None:
    """Rows into fewer ones."""
    series.add(launch, (), {}, dict(zip((*FROM, *NODE), (*found.names, *into.names), strict=True)))


def finish(series: Series, what: What, C: int, dtype: str, found: Rows, names: tuple[str, ...], fields: Fields) -> None:
    """The root of rows, and what follows from it."""
    launch = plan.finish(C, what, found.number, dtype)
    series.add(launch, (*names, "coefficients"), fields, dict(zip(FROM, found.names, strict=True)))


# --- a thread for every channel ---------------------------------------------------------------------------------------


def channelwise(series: Series, kernel: str, C: int, dtype: str, names: tuple[str, ...], fields: Fields) -> None:
    series.add(plan.channelwise(kernel, C, dtype), names, fields)


def reserve_coefficients(series: Series, C: int, dtype: str) -> None:
    """Six numbers of each channel, aligned to 16 bytes."""
    series.reserve("coefficients", 6 * C if dtype == "float64" else 4 * C)
