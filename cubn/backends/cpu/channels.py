"""What is done once a channel, in float64: statistics, coefficients of the elementwise passes, running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from cubn.backends.cpu.arithmetic import Coefficients
from cubn.backends.cpu.simd import (
    DOUBLE,
    FLOAT,
    I32,
    I64,
    Element,
    Value,
    by_cases,
    convert,
    instruction,
    pointer,
)

CODES = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}
"""How kernels are told a vector's dtype; 0 is an absent vector."""
_DTYPES = {code: dtype for dtype, code in CODES.items()}


def load(address: Value, kind: ir.Type = DOUBLE) -> Value:
    return Value(address.b, address.b.load(pointer(address, kind), typ=kind))


def store(value: Value, address: Value) -> None:
    address.b.store(value.v, pointer(address, value.type))


def number(like: Value, value: float) -> Value:
    return Value(like.b, ir.Constant(DOUBLE, value))


def cast(value: Value, kind: ir.Type) -> Value:
    """float64 rounded to acc, once."""
    return value if value.type == kind else Value(value.b, value.b.fptrunc(value.v, kind))


def double(value: Value) -> Value:
    return value if value.type == DOUBLE else Value(value.b, value.b.fpext(value.v, DOUBLE))


def sqrt(value: Value) -> Value:
    b = value.b
    kind = ir.FunctionType(DOUBLE, [DOUBLE])
    function = b.module.globals.get("llvm.sqrt.f64") or ir.Function(b.module, kind, "llvm.sqrt.f64")
    return Value(b, b.call(function, [value.v]))


def finite(value: Value) -> Value:
    """Neither infinite nor NaN: x - x is 0."""
    difference = value - value
    return Value(value.b, value.b.fcmp_ordered("==", difference.v, number(value, 0.0).v))


def load_parameter(address: Value, code: Value, absent: float, to: Value, kind: ir.Type) -> None:
    """Put a parameter of any dtype, or what stands for an absent one, into acc memory, rounded once."""

    def body(k: int) -> None:
        if k == 0:
            store(Value(to.b, ir.Constant(kind, absent)), to)
            return
        element = Element(_DTYPES[k])
        b = address.b
        raw = b.load(pointer(address, element.stored), typ=element.stored)
        store(cast(double(element.from_stored(Value(b, raw))), kind), to)

    by_cases(code, range(len(CODES) + 1), body)


@instruction()
def statistics(
    slot: Value, second: Value, count: Value, eps: Value, mean: Value, m2: Value, var: Value, invstd: Value
) -> None:
    """Mean, m2, var and invstd of one channel from its root node."""
    store(load(slot), mean)
    found = load(second)
    store(found, m2)
    variance = found / convert(count, DOUBLE)
    store(variance, var)
    store(number(variance, 1.0) / sqrt(variance + load(eps)), invstd)


@instruction()
def invstd_of(var: Value, eps: Value, invstd: Value) -> None:
    variance = load(var)
    store(number(variance, 1.0) / sqrt(variance + load(eps)), invstd)


@instruction()
def load_double(address: Value, code: Value, to: Value) -> None:
    load_parameter(address, code, 0.0, to, DOUBLE)


def coefficients(acc: ir.Type) -> Any:
    """An instruction: high, low, scale and beta of one channel into the table."""

    @instruction()
    def of_channel(
        to: Value,
        row: Value,
        mean: Value,
        invstd: Value,
        gamma: Value,
        gamma_code: Value,
        beta: Value,
        beta_code: Value,
    ) -> None:
        places = Coefficients(*(to + row * i for i in range(6)))
        centre = load(mean)
        high = cast(centre, acc)
        store(high, places.high)
        store(cast(centre - double(high), acc), places.low)
        load_parameter(gamma, gamma_code, 1.0, places.scale, acc)
        store(cast(load(invstd), acc) * load(places.scale, acc), places.scale)
        load_parameter(beta, beta_code, 0.0, places.beta, acc)

    return of_channel


def gradient_coefficients(acc: ir.Type) -> Any:
    """An instruction: k1 and k2 of one channel into the table, from its sums."""

    @instruction()
    def of_channel(to: Value, row: Value, sum_dy: Value, sum_dy_xmu: Value, count: Value, invstd: Value) -> None:
        places = Coefficients(*(to + row * i for i in range(6)))
        values, inverse = convert(count, DOUBLE), load(invstd)
        store(cast(load(sum_dy) / values, acc), places.k1)
        store(cast((load(sum_dy_xmu) / values) * (inverse * inverse), acc), places.k2)

    return of_channel


def store_rounded(value: Value, address: Value, code: Value) -> None:
    """float64 to a vector's dtype, rounded to nearest even once."""

    def body(k: int) -> None:
        element = Element(_DTYPES[k])
        if element.size == 2:
            store(element.to_stored(_rounded_to_odd(value)), address)
        else:
            store(cast(value, element.acc), address)

    by_cases(code, range(1, len(CODES) + 1), body)


def _rounded_to_odd(value: Value) -> Value:
    """float64 to float32, inexact results made odd: rounding that once more to 16 bits is a single rounding."""
    b = value.b
    near = Value(b, b.fptrunc(value.v, FLOAT))
    back = double(near)
    bits = b.bitcast(near.v, I32)

    def magnitude(v: Value) -> ir.Value:
        return b.bitcast(b.and_(b.bitcast(v.v, I64), I64((1 << 63) - 1)), DOUBLE)

    beyond = b.fcmp_ordered(">", magnitude(back), magnitude(value))
    toward_zero = b.select(beyond, b.sub(bits, I32(1)), bits)
    inexact = b.fcmp_ordered("!=", back.v, value.v)
    odd = b.select(inexact, b.or_(toward_zero, I32(1)), bits)
    return Value(b, b.bitcast(odd, FLOAT))


@instruction()
def parameter_gradients(
    sum_dy: Value, sum_dy_xmu: Value, invstd: Value, dgamma: Value, gamma_code: Value, dbeta: Value, beta_code: Value
) -> None:
    """dgamma and dbeta of one channel."""
    store_rounded(load(sum_dy_xmu) * load(invstd), dgamma, gamma_code)
    store_rounded(load(sum_dy), dbeta, beta_code)


def _update(kind: ir.Type) -> Callable[..., None]:
    """Running mean and variance of one channel, stored in `kind`, with the guard and both counters."""

    def update(
        old_mean: Value,
        old_var: Value,
        new_mean: Value,
        new_var: Value,
        mean: Value,
        m2: Value,
        var: Value,
        count: Value,
        momentum: Value,
        cumulative: Value,
        tracked: Value,
        skipped: Value,
    ) -> None:
        b = count.b
        batches, passed_over = load(tracked, I64) + 1, load(skipped, I64)
        one = number(load(mean), 1.0)
        average = one / convert(batches - passed_over, DOUBLE)
        is_cumulative = b.icmp_signed("!=", cumulative.v, I64(0))
        weight = Value(b, b.select(is_cumulative, average.v, load(momentum).v))
        unbiased = load(m2) / convert(count - 1, DOUBLE)
        keep = b.and_(b.icmp_signed(">=", count.v, I64(2)), finite(load(var)).v)
        changed = []
        for old, value in ((old_mean, load(mean)), (old_var, unbiased)):
            before = load(old, kind)
            after = cast((one - weight) * double(before) + weight * value, kind)
            keep = b.and_(keep, b.and_(finite(value).v, finite(double(after)).v))
            changed.append((before, after))
        for new, (before, after) in zip((new_mean, new_var), changed, strict=True):
            store(Value(b, b.select(keep, after.v, before.v)), new)
        store(batches, tracked)
        store(passed_over + Value(b, b.zext(b.not_(keep), I64)), skipped)

    return update


update = {3: instruction()(_update(FLOAT)), 4: instruction()(_update(DOUBLE))}
