// Exact arithmetic: every operation is one IEEE-754 operation, rounded to nearest even, subnormals kept.
//
// A bare `a * b + c` may be contracted to a fused multiply-add, and CuPy compiles with -ftz=true, which flushes
// subnormals in +, *, comparisons and conversions alike. So everything done to data goes through these functions, whose
// PTX says what is meant. The other branch is the same arithmetic for a host compiler with -ffp-contract=off.
//
// The one function that fuses is `quotient`, a / count for counts from 1 to 8 but 6: the bits of a division, but for
// the sign of a zero, in four instructions. With Q = a / count, u the unit in the last place of q, and p the bits of a
// significand:
// - q = a * reciprocal is within 1.5 u of Q, for `reciprocal` is rounded to nearest, and so is the product.
// - rest = a - q * count is a multiple of u and at most 12 u: fused, it has no error, among subnormals neither.
// - q + rest * reciprocal is off Q by at most 1.5 u / 2^p, before it is rounded once. Between two results are multiples
//   of u / 4; one that is not Q itself is u / (4 count) away or more, so Q rounds alike.
// - One that is Q itself is a tie. p + 1 bits times an odd count have more than p: no tie but of an even count, among
//   subnormals. With 2, 4 and 8 nothing but the last step rounds; with 6 it could go wrong.
// Infinities: their rest is a NaN, which `max` replaces by the least number; it leaves an infinite q what it is.
#pragma once

template <class Acc> constexpr Acc LEAST = -0x1.fffffep127f;
template <> constexpr double LEAST<double> = -0x1.fffffffffffffp1023;

#ifdef __CUDA_ARCH__
#define EXACT __device__ __forceinline__
#define BINARY(name, instruction, type, letter)                                                              \
    EXACT type name(type a, type b) {                                                                        \
        type r;                                                                                              \
        asm(instruction " %0, %1, %2;" : "=" letter(r) : letter(a), letter(b));                              \
        return r;                                                                                            \
    }
#define UNARY(name, instruction, to, to_letter, from, from_letter)                                           \
    EXACT to name(from a) {                                                                                  \
        to r;                                                                                                \
        asm(instruction " %0, %1;" : "=" to_letter(r) : from_letter(a));                                     \
        return r;                                                                                            \
    }
#define COMPARISON(type, format, letter)                                                                     \
    EXACT bool at_most(type a, type b) {                                                                     \
        int r;                                                                                               \
        asm("{ .reg .pred p; setp.le." format " p, %1, %2; selp.s32 %0, 1, 0, p; }"                          \
            : "=r"(r) : letter(a), letter(b));                                                               \
        return r;                                                                                            \
    }                                                                                                        \
    EXACT type zero_where_at_most(type value, type a, type b) {                                              \
        type r;                                                                                              \
        asm("{ .reg .pred p; setp.le." format " p, %2, %3; selp." format " %0, %4, %1, p; }"                 \
            : "=" letter(r) : letter(value), letter(a), letter(b), letter(type(0)));                         \
        return r;                                                                                            \
    }
BINARY(add, "add.rn.f32", float, "f")
BINARY(subtract, "sub.rn.f32", float, "f")
BINARY(multiply, "mul.rn.f32", float, "f")
BINARY(divide, "div.rn.f32", float, "f")
BINARY(add, "add.rn.f64", double, "d")
BINARY(subtract, "sub.rn.f64", double, "d")
BINARY(multiply, "mul.rn.f64", double, "d")
BINARY(divide, "div.rn.f64", double, "d")
UNARY(square_root, "sqrt.rn.f64", double, "d", double, "d")
UNARY(to_float, "cvt.rn.f32.f64", float, "f", double, "d")
UNARY(to_double, "cvt.f64.f32", double, "d", float, "f")
UNARY(from_half, "cvt.f32.f16", float, "f", unsigned short, "h")
UNARY(to_half, "cvt.rn.f16.f32", unsigned short, "h", float, "f")
#if __CUDA_ARCH__ >= 800
#define HAS_BFLOAT 1 // and both formats in pairs, the second value first
UNARY(to_bfloat, "cvt.rn.bf16.f32", unsigned short, "h", float, "f")
#define PAIR(name, instruction)                                                                              \
    EXACT unsigned name(float low, float high) {                                                             \
        unsigned r;                                                                                          \
        asm(instruction " %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));                                     \
        return r;                                                                                            \
    }
PAIR(to_half_pair, "cvt.rn.f16x2.f32")
PAIR(to_bfloat_pair, "cvt.rn.bf16x2.f32")
#undef PAIR
#endif
COMPARISON(float, "f32", "f")
COMPARISON(double, "f64", "d")
#define ADDITION(type, format, letter)                                                                       \
    EXACT type add_where(bool wanted, type a, type b) {                                                      \
        asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p add.rn." format " %0, %0, %2; }"                       \
            : "+" letter(a) : "r"(static_cast<int>(wanted)), letter(b));                                     \
        return a;                                                                                            \
    }
ADDITION(float, "f32", "f")
ADDITION(double, "f64", "d")
#undef ADDITION
#define QUOTIENT(type, format, letter)                                                                       \
    EXACT type quotient(type a, type count, type reciprocal) {                                               \
        type r;                                                                                              \
        asm("{ /* quotient */ .reg ." format " q, minus, rest;"                                              \
            " mul.rn." format " q, %1, %3; neg." format " minus, q; fma.rn." format " rest, minus, %2, %1;"  \
            " max." format " rest, rest, %4; fma.rn." format " %0, rest, %3, q; }"                           \
            : "=" letter(r) : letter(a), letter(count), letter(reciprocal), letter(LEAST<type>));            \
        return r;                                                                                            \
    }
QUOTIENT(float, "f32", "f")
QUOTIENT(double, "f64", "d")
#undef QUOTIENT
EXACT unsigned bits_of(float a) { return __float_as_uint(a); }
EXACT float float_of(unsigned bits) { return __uint_as_float(bits); }
EXACT unsigned long long bits_of(double a) { return __double_as_longlong(a); }
EXACT double double_of(unsigned long long bits) { return __longlong_as_double(bits); }
EXACT unsigned high_half(unsigned a, unsigned b) { return __umulhi(a, b); }
EXACT unsigned long long high_half(unsigned long long a, unsigned long long b) { return __umul64hi(a, b); }
#undef BINARY
#undef UNARY
#undef COMPARISON
#else
#define EXACT inline
#define BINARY(name, sign, type)                                                                             \
    EXACT type name(type a, type b) { return a sign b; }
BINARY(add, +, float)
BINARY(subtract, -, float)
BINARY(multiply, *, float)
BINARY(divide, /, float)
BINARY(add, +, double)
BINARY(subtract, -, double)
BINARY(multiply, *, double)
BINARY(divide, /, double)
EXACT double square_root(double a) { return __builtin_sqrt(a); }
template <class Acc> EXACT Acc add_where(bool wanted, Acc a, Acc b) { return wanted ? a + b : a; }
EXACT float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EXACT double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class Acc> EXACT Acc quotient(Acc a, Acc count, Acc reciprocal) {
    const Acc q = a * reciprocal, rest = fused(-q, count, a);
    return fused(rest >= LEAST<Acc> ? rest : LEAST<Acc>, reciprocal, q);
}
EXACT float to_float(double a) { return static_cast<float>(a); }
EXACT double to_double(float a) { return a; }
template <class Acc> EXACT bool at_most(Acc a, Acc b) { return a <= b; }
template <class Acc> EXACT Acc zero_where_at_most(Acc value, Acc a, Acc b) { return a <= b ? Acc(0) : value; }
template <class To, class From> EXACT To same_bits(From a) {
    static_assert(sizeof(To) == sizeof(From), "same_bits keeps the size");
    To r;
    __builtin_memcpy(&r, &a, sizeof r);
    return r;
}
EXACT float from_half(unsigned short bits) { return same_bits<_Float16>(bits); }
EXACT unsigned short to_half(float a) { return same_bits<unsigned short>(static_cast<_Float16>(a)); }
EXACT unsigned bits_of(float a) { return same_bits<unsigned>(a); }
EXACT float float_of(unsigned bits) { return same_bits<float>(bits); }
EXACT unsigned long long bits_of(double a) { return same_bits<unsigned long long>(a); }
EXACT double double_of(unsigned long long bits) { return same_bits<double>(bits); }
EXACT unsigned high_half(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
EXACT unsigned long long high_half(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
#undef BINARY
#endif

#ifndef HAS_BFLOAT
EXACT unsigned short to_bfloat(float a) { // to nearest even, by hand
    const unsigned u = bits_of(a);
    const unsigned rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return static_cast<unsigned short>((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}
EXACT unsigned to_half_pair(float low, float high) { return to_half(low) | static_cast<unsigned>(to_half(high)) << 16; }
EXACT unsigned to_bfloat_pair(float low, float high) {
    return to_bfloat(low) | static_cast<unsigned>(to_bfloat(high)) << 16;
}
#endif

EXACT double to_double(double a) { return a; }

// A count as a number: exact below 2^24 in float (a tile holds 2048 values), below 2^53 in double.
EXACT void from_integer(long long a, float& r) { r = static_cast<float>(static_cast<int>(a)); }
EXACT void from_integer(long long a, double& r) { r = static_cast<double>(a); }
EXACT double from_integer(long long a) { return static_cast<double>(a); }

EXACT bool is_finite(double a) { return (bits_of(a) >> 52 & 0x7ff) != 0x7ff; }

// Accumulator from double: rounded once, or as it is. And from its bits.
template <class Acc> struct Rounded;
template <> struct Rounded<float> {
    static EXACT float from(double a) { return to_float(a); }
    static EXACT float of_bits(long long bits) { return float_of(static_cast<unsigned>(bits)); }
};
template <> struct Rounded<double> {
    static EXACT double from(double a) { return a; }
    static EXACT double of_bits(long long bits) { return double_of(static_cast<unsigned long long>(bits)); }
};
