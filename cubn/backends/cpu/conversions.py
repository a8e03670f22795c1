"""16-bit floats as float32 and back, in LLVM IR: on 16 lanes or on one number.

float16 is converted by instructions where the processor has them, else by the same integer arithmetic for every
processor; bfloat16 always so. Both give the same bits, NaNs too.
"""

from __future__ import annotations

from llvmlite import ir

from cubn.backends.cpu.target import converts_halves

I16, I32, HALF, FLOAT = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()

INFINITY = 0x7C00  # of float16
REBIAS = (127 - 15) << 23  # from an exponent of float16 to one of float32
LEAST_NORMAL = (127 - 14) << 23  # of float16, as float32 bits
BEYOND = (127 + 16) << 23  # the power of two that float16 has no more


def like(value: ir.Value, element: ir.Type) -> ir.Type:
    """The type of as many elements as `value` has."""
    kind = value.type
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def full(kind: ir.Type, number: float) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def widened_half(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """float16, given as its bits, in float32: exact."""
    if converts_halves():
        return b.fpext(b.bitcast(bits, like(bits, HALF)), like(bits, FLOAT))
    return _widened_by_hand(b, bits)


def narrowed_half(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 rounded to float16, to nearest even, as its bits."""
    if converts_halves():
        return b.bitcast(b.fptrunc(value, like(value, HALF)), like(value, I16))
    return _narrowed_by_hand(b, value)


def _widened_by_hand(b: ir.IRBuilder, half: ir.Value) -> ir.Value:
    wide, real = like(half, I32), like(half, FLOAT)
    bits = b.zext(half, wide)
    magnitude = b.and_(bits, full(wide, 0x7FFF))
    normal = b.add(b.shl(magnitude, full(wide, 13)), full(wide, REBIAS))
    subnormal = b.bitcast(b.fmul(b.sitofp(magnitude, real), full(real, 2.0**-24)), wide)
    infinity = b.add(normal, full(wide, REBIAS))
    nan = b.or_(infinity, full(wide, 1 << 22))  # a quiet one
    found = b.select(b.icmp_signed("<", magnitude, full(wide, 1 << 10)), subnormal, normal)
    found = b.select(b.icmp_signed("==", magnitude, full(wide, INFINITY)), infinity, found)
    found = b.select(b.icmp_signed(">", magnitude, full(wide, INFINITY)), nan, found)
    sign = b.shl(b.and_(bits, full(wide, 0x8000)), full(wide, 16))
    return b.bitcast(b.or_(found, sign), real)


def _narrowed_by_hand(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    wide, real = like(value, I32), like(value, FLOAT)
    bits = b.bitcast(value, wide)
    magnitude = b.and_(bits, full(wide, 0x7FFFFFFF))
    bounded = b.select(b.icmp_signed("<", magnitude, full(wide, BEYOND)), magnitude, full(wide, BEYOND))
    normal = _to_even(b, b.sub(bounded, full(wide, REBIAS)), 13)
    # The last bit of 0.5 is that of a subnormal float16: adding 0.5 rounds to it, and leaves it in the lowest place.
    half = full(real, 0.5)
    subnormal = b.sub(b.bitcast(b.fadd(b.bitcast(bounded, real), half), wide), b.bitcast(half, wide))
    nan = b.or_(b.lshr(bits, full(wide, 13)), full(wide, 1 << 9))
    nan = b.or_(b.and_(nan, full(wide, (1 << 10) - 1)), full(wide, INFINITY))
    found = b.select(b.icmp_signed("<", magnitude, full(wide, LEAST_NORMAL)), subnormal, normal)
    found = b.select(b.fcmp_unordered("uno", value, value), nan, found)
    sign = b.and_(b.lshr(bits, full(wide, 16)), full(wide, 0x8000))
    return b.trunc(b.or_(found, sign), like(value, I16))


def widened_bfloat(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """bfloat16, given as its bits, in float32: exact."""
    wide = like(bits, I32)
    return b.bitcast(b.shl(b.zext(bits, wide), full(wide, 16)), like(bits, FLOAT))


def narrowed_bfloat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 rounded to bfloat16, to nearest even, as its bits. A NaN stays a NaN."""
    wide = like(value, I32)
    rounded = _to_even(b, b.bitcast(value, wide), 16)
    nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(nan, full(wide, 0x7FC0), rounded), like(value, I16))


def _to_even(b: ir.IRBuilder, bits: ir.Value, shift: int) -> ir.Value:
    """Float bits without the last ones, rounded to nearest even."""
    wide = bits.type
    odd = b.and_(b.lshr(bits, full(wide, shift)), full(wide, 1))
    return b.lshr(b.add(bits, b.add(odd, full(wide, (1 << shift - 1) - 1))), full(wide, shift))
