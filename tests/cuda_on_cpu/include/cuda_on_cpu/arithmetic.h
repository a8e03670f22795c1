// Floating-point functions that are exactly rounded on the device too, and reinterpretations of bits.
#pragma once
#include "cuda_on_cpu/bits.h"

inline int __float_as_int(float x) { return cuda_on_cpu::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bit_cast<double>(x); }
inline int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }
inline double __hiloint2double(int high, int low) {
    return __longlong_as_double(static_cast<long long>(high) << 32 | static_cast<unsigned>(low));
}

// Round to nearest even; never contracted (-ffp-contract=off).
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }

#define CUDA_ON_CPU_UNARY(name)                                                     \
    inline float name##f(float x) { return __builtin_##name##f(x); }                \
    inline float name(float x) { return __builtin_##name##f(x); }                   \
    inline double name(double x) { return __builtin_##name(x); }
#define CUDA_ON_CPU_BINARY(name)                                                    \
    inline float name##f(float a, float b) { return __builtin_##name##f(a, b); }    \
    inline float name(float a, float b) { return __builtin_##name##f(a, b); }       \
    inline double name(double a, double b) { return __builtin_##name(a, b); }
CUDA_ON_CPU_UNARY(fabs)
CUDA_ON_CPU_UNARY(sqrt)
CUDA_ON_CPU_UNARY(floor)
CUDA_ON_CPU_UNARY(ceil)
CUDA_ON_CPU_UNARY(trunc)
CUDA_ON_CPU_UNARY(rint)
CUDA_ON_CPU_BINARY(fmin)
CUDA_ON_CPU_BINARY(fmax)
CUDA_ON_CPU_BINARY(copysign)
#undef CUDA_ON_CPU_UNARY
#undef CUDA_ON_CPU_BINARY
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
