// Exact arithmetic: every operation is one IEEE-754 operation, rounded to nearest even, subnormals kept.
//
// A bare `a * b + c` may be contracted to a fused multiply-add, and CuPy compiles with -ftz=true, which flushes
// subnormals in +, *, comparisons and conversions alike. So everything done to data goes through these functions, whose
// PTX says what is meant. The other branch is the same arithmetic for a host compiler with -ffp-contract=off.
#pragma once

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
#define NOT_POSITIVE(type, format, letter)                                                                   \
    EXACT bool not_positive(type a) {                                                                        \
        int r;                                                                                               \
        asm("{ .reg .pred p; setp.le." format " p, %1, %2; selp.s32 %0, 1, 0, p; }"                          \
            : "=r"(r) : letter(a), letter(type(0)));                                                         \
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
NOT_POSITIVE(float, "f32", "f")
NOT_POSITIVE(double, "f64", "d")
EXACT unsigned bits_of(float a) { return __float_as_uint(a); }
EXACT float float_of(unsigned bits) { return __uint_as_float(bits); }
EXACT unsigned long long bits_of(double a) { return __double_as_longlong(a); }
#undef BINARY
#undef UNARY
#undef NOT_POSITIVE
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
EXACT float to_float(double a) { return static_cast<float>(a); }
EXACT double to_double(float a) { return a; }
EXACT bool not_positive(float a) { return a <= 0; }
EXACT bool not_positive(double a) { return a <= 0; }
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
#undef BINARY
#endif

EXACT double to_double(double a) { return a; }

// A count as a number: exact below 2^24 in float (a tile holds 2048 values), below 2^53 in double.
EXACT void from_integer(long long a, float& r) { r = static_cast<float>(static_cast<int>(a)); }
EXACT void from_integer(long long a, double& r) { r = static_cast<double>(a); }
EXACT double from_integer(long long a) { return static_cast<double>(a); }

EXACT bool is_finite(double a) { return (bits_of(a) >> 52 & 0x7ff) != 0x7ff; }

// Accumulator from double: rounded once, or as it is.
template <class Acc> struct Rounded;
template <> struct Rounded<float> {
    static EXACT float from(double a) { return to_float(a); }
};
template <> struct Rounded<double> {
    static EXACT double from(double a) { return a; }
};
