"""What is done once a channel, in float64, 16 channels at a time: statistics, coefficients of the elementwise passes,
running statistics.

An instruction takes the addresses of the first channel's numbers and how many channels there are, at most 16. Vectors
of the backend's own are contiguous; a caller's is (address, stride in bytes, code of its dtype).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from cubn._types import VECTOR_CODES
from cubn.backends.cpu.arithmetic import Coefficients
from cubn.backends.cpu.simd import (
    DOUBLE,
    FLOAT,
    I32,
    I64,
    LANES,
    Element,
    Value,
    Values,
    by_cases,
    constant,
    convert,
    first_lanes,
    instruction,
    load_raw,
    load_strided,
    scalar_at,
    select,
    splat,
    store_raw,
    store_strided,
    vector_of,
)

_DTYPES = {code: dtype for dtype, code in VECTOR_CODES.items()}


def load(address: Value, mask: Value, kind: ir.Type = DOUBLE) -> Value:
    return load_raw(address, kind, 8 if kind in (DOUBLE, I64) else 4, mask)


def store(value: Value, address: Value, mask: Value) -> None:
    store_raw(value, address, 8 if value.type.element in (DOUBLE, I64) else 4, mask)


def number(address: Value) -> Value:
    """The float64 at an address, for all channels."""
    return splat(scalar_at(address, DOUBLE, 8))


def cast(value: Value, kind: ir.Type) -> Value:
    """float64 rounded to acc, once."""
    return value if value.type.element == kind else Value(value.b, value.b.fptrunc(value.v, vector_of(kind)))


def double(value: Value) -> Value:
    return value if value.type.element == DOUBLE else Value(value.b, value.b.fpext(value.v, vector_of(DOUBLE)))


def sqrt(value: Value) -> Value:
    b, name = value.b, "llvm.sqrt.v16f64"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(value.type, [value.type]), name)
    return Value(b, b.call(function, [value.v]))


def finite(value: Value) -> Value:
    """Neither infinite nor NaN: x - x is 0."""
    difference = value - value
    return Value(value.b, value.b.fcmp_ordered("==", difference.v, constant(value, 0.0).v))


def inverse_deviation(var: Value, eps: Value) -> Value:
    return constant(var, 1.0) / sqrt(var + number(eps))


def for_parameter(code: Value, present: Callable[[Element], None], absent: Callable[[], None] | None = None) -> None:
    """Emit present(element) for every dtype a parameter may have, and absent(), and run what `code` says."""

    def body(k: int) -> None:
        if k:
            present(Element(_DTYPES[k]))
        elif absent:
            absent()

    by_cases(code, range(len(VECTOR_CODES) + 1), body)


def load_parameter(parameter: Values, missing: float, to: Value, kind: ir.Type, mask: Value) -> None:
    """Put a parameter of any dtype, or what stands for an absent one, into memory, rounded to `kind` once."""
    address, stride, code = parameter

    def present(element: Element) -> None:
        raw = load_strided(address, stride, element.stored, mask)
        store(cast(double(element.from_stored(raw)), kind), to, mask)

    def absent() -> None:
        vector = vector_of(kind)
        store(Value(to.b, ir.Constant(vector, [missing] * LANES)), to, mask)

    for_parameter(code, present, absent)


@instruction()
def keep(parameter: Values, kept: Value, lanes: Value) -> None:
    """A parameter of any dtype, in float64."""
    load_parameter(parameter, 0.0, kept, DOUBLE, first_lanes(lanes))


@instruction()
def statistics(roots: Values, stride: Value, count: Value, eps: Value, to: Values, lanes: Value) -> None:
    """Mean, m2, var and invstd from the two halves of root nodes."""
    (first, second), (mean, m2, var, invstd) = roots, to
    mask = first_lanes(lanes)
    store(load_strided(first, stride, DOUBLE, mask), mean, mask)
    found = load_strided(second, stride, DOUBLE, mask)
    store(found, m2, mask)
    variance = found / splat(convert(count, DOUBLE))
    store(variance, var, mask)
    store(inverse_deviation(variance, eps), invstd, mask)


@instruction()
def frozen_statistics(running_mean: Values, running_var: Values, eps: Value, to: Values, lanes: Value) -> None:
    """Mean, var and invstd from running statistics."""
    mean, var, invstd = to
    mask = first_lanes(lanes)
    load_parameter(running_mean, 0.0, mean, DOUBLE, mask)
    load_parameter(running_var, 0.0, var, DOUBLE, mask)
    store(inverse_deviation(load(var, mask), eps), invstd, mask)


def entries(table: Values) -> Coefficients:
    """Where a channel's coefficients are in a table (address, bytes from row to row)."""
    address, row = table
    return Coefficients(*(address + row * i for i in range(6)))


def coefficients(acc: ir.Type) -> Any:
    """An instruction: high, low, scale and beta into the table. Where low is not finite, high is NaN too: then y is NaN
    for those who do not read low.
    """

    @instruction()
    def of_channels(table: Values, mean: Value, invstd: Value, gamma: Values, beta: Values, lanes: Value) -> None:
        mask = first_lanes(lanes)
        places = entries(table)
        centre = load(mean, mask)
        high = cast(centre, acc)
        low = cast(centre - double(high), acc)
        store(high + (low - low), places.high, mask)
        store(low, places.low, mask)
        load_parameter(gamma, 1.0, places.scale, acc, mask)
        store(cast(load(invstd, mask), acc) * load(places.scale, mask, acc), places.scale, mask)
        load_parameter(beta, 0.0, places.beta, acc, mask)

    return of_channels


def gradient_coefficients(acc: ir.Type) -> Any:
    """An instruction: k1 and k2 into the table, from the sums."""

    @instruction()
    def of_channels(table: Values, sums: Values, count: Value, invstd: Value, lanes: Value) -> None:
        sum_dy, sum_dy_xmu = sums
        mask = first_lanes(lanes)
        places = entries(table)
        values, inverse = splat(convert(count, DOUBLE)), load(invstd, mask)
        store(cast(load(sum_dy, mask) / values, acc), places.k1, mask)
        store(cast((load(sum_dy_xmu, mask) / values) * (inverse * inverse), acc), places.k2, mask)

    return of_channels


def store_rounded(value: Value, vector: Values, mask: Value) -> None:
    """float64 to a vector's dtype, rounded to nearest even once."""
    address, stride, code = vector

    def present(element: Element) -> None:
        rounded = element.to_stored(_rounded_to_odd(value)) if element.size == 2 else cast(value, element.acc)
        store_strided(rounded, address, stride, mask)

    for_parameter(code, present)


def _rounded_to_odd(value: Value) -> Value:
    """float64 to float32, inexact results made odd: rounding that once more to 16 bits is a single rounding."""
    b = value.b
    near = cast(value, FLOAT)
    back = double(near)

    def full(kind: ir.Type, bits: int) -> ir.Constant:
        return ir.Constant(vector_of(kind), [bits] * LANES)

    def magnitude(v: Value) -> ir.Value:
        return b.bitcast(b.and_(b.bitcast(v.v, vector_of(I64)), full(I64, (1 << 63) - 1)), vector_of(DOUBLE))

    bits = b.bitcast(near.v, vector_of(I32))
    beyond = b.fcmp_ordered(">", magnitude(back), magnitude(value))
    toward_zero = b.select(beyond, b.sub(bits, full(I32, 1)), bits)
    inexact = b.fcmp_ordered("!=", back.v, value.v)
    odd = b.select(inexact, b.or_(toward_zero, full(I32, 1)), bits)
    return Value(b, b.bitcast(odd, vector_of(FLOAT)))


@instruction()
def parameter_gradients(sums: Values, invstd: Value, dgamma: Values, dbeta: Values, lanes: Value) -> None:
    sum_dy, sum_dy_xmu = sums
    mask = first_lanes(lanes)
    store_rounded(load(sum_dy_xmu, mask) * load(invstd, mask), dgamma, mask)
    store_rounded(load(sum_dy, mask), dbeta, mask)


def _update(kind: ir.Type) -> Callable[..., None]:
    """Running mean and variance, stored in `kind`, with the guard and both counters.

    Old values that are not finite give way to new ones, as does everything at a weight of 1. The variance is
    m2 / (count - ddof).
    """

    def update(
        old_mean: Values,
        old_var: Values,
        new_mean: Values,
        new_var: Values,
        batch: Values,
        count: Value,
        ddof: Value,
        momentum: Value,
        cumulative: Value,
        counters: Values,
        lanes: Value,
    ) -> None:
        (mean, m2), (tracked, skipped) = batch, counters
        b, mask = count.b, first_lanes(lanes)
        none = ir.Constant(mask.type, [0] * LANES)
        batches, passed_over = load(tracked, mask, I64), load(skipped, mask, I64)
        batches += constant(batches, 1)
        one = constant(load(mean, mask), 1.0)
        average = one / Value(b, b.sitofp((batches - passed_over).v, one.type))
        is_cumulative = b.icmp_signed("!=", cumulative.v, I64(0))
        weight = Value(b, b.select(is_cumulative, average.v, number(momentum).v))
        before = [load_strided(old, stride, kind, mask) for old, stride, _ in (old_mean, old_var)]
        broken = b.not_(b.and_(*(finite(double(old)).v for old in before)))
        full = b.fcmp_ordered("==", weight.v, one.v)
        heals = b.and_(broken, b.fcmp_unordered("!=", weight.v, constant(one, 0.0).v))
        alone = Value(b, b.or_(full, heals))
        values = load(mean, mask), load(m2, mask) / splat(convert(count - ddof, DOUBLE))
        after = [
            cast(select(alone, value, (one - weight) * double(old) + weight * value), kind)
            for old, value in zip(before, values, strict=True)
        ]
        enough = b.select(b.icmp_signed(">=", count.v, I64(2)), mask.v, none)
        keep = b.and_(enough, b.and_(*(finite(double(new)).v for new in after)))
        for (to, stride, _), old, new in zip((new_mean, new_var), before, after, strict=True):
            store_strided(select(Value(b, keep), new, old), to, stride, mask)
        anew = Value(b, b.and_(b.and_(keep, heals), b.select(is_cumulative, b.not_(full), none)))
        passed_over += Value(b, b.zext(b.not_(keep), passed_over.type))
        store(select(anew, constant(batches, 1), batches), tracked, mask)
        store(select(anew, constant(batches, 0), passed_over), skipped, mask)

    return update


update = {3: instruction()(_update(FLOAT)), 4: instruction()(_update(DOUBLE))}
