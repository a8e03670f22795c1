"""Instructions on floating-point numbers: each becomes a function of the registers and of the threads in it.

Not as on a device: approximate reciprocals are correctly rounded, and the directed rounding of fused operations and of
products of float64 is to nearest: compilers use it behind divisions and roots of extreme numbers, and nowhere else.
"""

import ctypes
import re
from collections.abc import Callable

import numpy as np

from tests.cuda.machine.registers import (
    COMBINE,
    COMPARE,
    Act,
    Unknown,
    number,
    predicate,
    put_number,
    put_predicate,
    put_word,
    signed,
    word,
)

DIRECTED = re.compile(r"\.R[MPZ]\b")
_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_libm.fmaf.restype, _libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def _fused(double: bool, *given):
    function, kind = (_libm.fma, np.float64) if double else (_libm.fmaf, np.float32)
    return np.array([function(*map(float, each)) for each in np.broadcast(*given)], kind)


def _arithmetic(name, operands):
    double, operation = name.startswith("D"), name[1:4]
    put = put_number(operands[0], double)
    reads = [number(text, double) for text in operands[1:]]
    flushes = ".FTZ" in name
    function = {"ADD": np.add, "MUL": np.multiply, "FMA": lambda *given: _fused(double, *given)}[operation]
    if ".SAT" in name or (DIRECTED.search(name) and name[:2] not in ("FF", "DF", "DM")):  # see above
        raise Unknown(name)

    def flushed(v):
        return np.where(np.abs(v) < np.float32(2.0**-126), np.copysign(np.float32(0), v), v) if flushes else v

    return lambda s, a: put(s, a, flushed(function(*(flushed(read(s, a)) for read in reads))))


def _compare_numbers(name, operands):
    parts = name.split(".")
    double, kind, combine = name.startswith("D"), parts[1], COMBINE[parts[-1]]
    first, second = map(put_predicate, operands[:2])
    left, right = number(operands[2], double), number(operands[3], double)
    also = predicate(operands[4])

    def act(s, a):
        x, y = np.broadcast_arrays(left(s, a), right(s, a))
        unordered = np.isnan(x) | np.isnan(y)
        if kind == "NAN":
            found = unordered
        elif kind == "NUM":
            found = ~unordered
        elif kind.endswith("U"):
            found = COMPARE[kind[:-1]](x, y) | unordered
        else:
            found = COMPARE[kind](x, y) & ~unordered
        given = also(s, a)
        first(s, a, combine(found, given))
        second(s, a, combine(~found, given))

    return act


def _least_number(name, operands):
    put, left, right, least = put_number(operands[0]), number(operands[1]), number(operands[2]), predicate(operands[3])
    lower, upper = (np.minimum, np.maximum) if ".NAN" in name else (np.fmin, np.fmax)

    def act(s, a):
        x, y = left(s, a), right(s, a)
        put(s, a, np.where(least(s, a), lower(x, y), upper(x, y)))

    return act


def _needs_care(name, operands):
    """FCHK: whether a division is of numbers for which its fast path is not right."""
    put = put_predicate(operands[0])
    left, right = number(operands[1]), number(operands[2])

    def act(s, a):
        x, y = np.broadcast_arrays(left(s, a), right(s, a))
        of_x, of_y = ((np.ascontiguousarray(v).view(np.uint32) >> 23 & 255).astype(np.int64) for v in (x, y))
        usual = (of_x > 24) & (of_x < 255) & (of_y > 0) & (of_y < 253) & (abs(of_x - of_y) < 125)
        put(s, a, ~usual)

    return act


def _approximate(name, operands):
    kind = name.split(".")[1]
    function = {"RCP": lambda v: 1 / v, "RSQ": lambda v: 1 / np.sqrt(v)}[kind[:3]]
    if kind.endswith("64H"):  # of the high word of a number
        put, read = put_word(operands[0]), word(operands[1])

        def act(s, a):
            value = np.atleast_1d(read(s, a) << np.uint64(32)).view(np.float64)
            put(s, a, np.atleast_1d(function(value)).view(np.uint64) >> np.uint64(32))

        return act
    put, read = put_number(operands[0]), number(operands[1])
    return lambda s, a: put(s, a, function(read(s, a)).astype(np.float32))


def _float_to_float(name, operands):
    if DIRECTED.search(name):
        raise Unknown(name)
    _, to, source = name.replace(".FTZ", "").split(".")
    put, read = put_number(operands[0], to == "F64"), number(operands[1], source == "F64")
    return lambda s, a: put(s, a, read(s, a))


def _packed(name, operands):
    put, high, low = put_word(operands[0]), number(operands[1]), number(operands[2])
    bfloat, clamps = "BF16" in name, "RELU" in name
    if DIRECTED.search(name):
        raise Unknown(name)

    def bits(values):
        values = np.atleast_1d(values).astype(np.float32)
        if clamps:
            values = np.where(values > 0, values, np.where(np.isnan(values), values, np.float32(0)))
        if not bfloat:
            return np.where(np.isnan(values), np.uint64(0x7FFF), values.astype(np.float16).view(np.uint16))
        word = values.view(np.uint32).astype(np.uint64)
        rounded = (word + np.uint64(0x7FFF) + (word >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        return np.where(np.isnan(values), np.uint64(0x7FFF), rounded)

    def act(s, a):
        upper, lower = (bits(read(s, a)).astype(np.uint64) for read in (high, low))
        put(s, a, upper << np.uint64(16) | lower)

    return act


def _half_to_float(name, operands):
    name, _, which = operands[2].partition(".")
    put, read, shift = put_number(operands[0]), word(name), np.uint64(16 if which == "H1_H1" else 0)
    return lambda s, a: put(s, a, np.atleast_1d(read(s, a) >> shift).astype(np.uint16).view(np.float16))


def _two_halves(name, operands):
    """A constant, in disguise."""
    if [text.lstrip("-") for text in operands[1:3]] != ["RZ", "RZ"]:
        raise Unknown(name)
    high, low = (int(np.float16(text.replace("QNAN", "nan")).view(np.uint16)) for text in operands[3:])
    put, value = put_word(operands[0]), np.uint64(high << 16 | low)
    return lambda s, a: put(s, a, value)


def _integer_to_float(name, operands):
    parts = name.split(".")
    wide, double, unsigned = bool({"S64", "U64"} & set(parts)), "F64" in parts, bool({"U32", "U64"} & set(parts))
    put, read = put_number(operands[0], double), word(operands[1], 2 if wide else 1)
    up = "RP" in parts

    def act(s, a):
        value = np.atleast_1d(read(s, a))
        value = value if unsigned else signed(value, 64 if wide else 32)
        found = value.astype(np.float64 if double else np.float32)
        if up:  # of a divisor
            below = found.astype(np.float64) < value.astype(np.float64)
            found = np.where(below, np.nextafter(found, found.dtype.type(np.inf)), found)
        put(s, a, found)

    return act


def _float_to_integer(name, operands):
    wide = "U64" in name
    put, read = put_word(operands[0], 2 if wide else 1), number(operands[1])
    return lambda s, a: put(
        s, a, np.clip(read(s, a).astype(np.float64), 0, 2.0**63 if wide else 2.0**32 - 1).astype(np.uint64)
    )


FLOATS: dict[str, Callable[[str, list[str]], Act]] = {
    "FADD": _arithmetic,
    "FMUL": _arithmetic,
    "FFMA": _arithmetic,
    "DADD": _arithmetic,
    "DMUL": _arithmetic,
    "DFMA": _arithmetic,
    "FSETP": _compare_numbers,
    "DSETP": _compare_numbers,
    "FMNMX": _least_number,
    "FCHK": _needs_care,
    "MUFU": _approximate,
    "F2F": _float_to_float,
    "F2FP": _packed,
    "HADD2": _half_to_float,
    "HFMA2": _two_halves,
    "I2F": _integer_to_float,
    "I2FP": _integer_to_float,
    "F2I": _float_to_integer,
}
"""By the beginning of their names."""
