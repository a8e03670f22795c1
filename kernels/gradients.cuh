// dgamma and dbeta from the sums.
#pragma once
#include "coefficients.cuh"

// A double rounded once to 16 bits: first to a float made odd where inexact, which the second rounding cannot see.
__device__ __forceinline__ float rounded_to_odd(double value) {
    const float near = to_float(value);
    const double back = to_double(near);
    if (back == value || !is_finite(back)) return near;
    unsigned bits = bits_of(near);
    const unsigned long long magnitude = ~0ull >> 1;
    if ((bits_of(back) & magnitude) > (bits_of(value) & magnitude)) bits -= 1; // towards zero
    return float_of(bits | 1);
}

__device__ __forceinline__ void store_gradient(const Vector& v, long long c, double value) {
    const long long i = c * v.stride;
    switch (v.format) {
    case 1: reinterpret_cast<float16*>(v.pointer)[i] = Format<float16>::round(rounded_to_odd(value)); break;
    case 2: reinterpret_cast<bfloat16*>(v.pointer)[i] = Format<bfloat16>::round(rounded_to_odd(value)); break;
    case 3: reinterpret_cast<float*>(v.pointer)[i] = to_float(value); break;
    case 4: reinterpret_cast<double*>(v.pointer)[i] = value; break;
    }
}

// Those that are asked for.
__device__ __forceinline__ void store_parameter_gradients(
    const Parameters& p, long long c, double sum_dy, double sum_dy_xmu, double invstd
) {
    store_gradient(p.dgamma, c, multiply(sum_dy_xmu, invstd));
    store_gradient(p.dbeta, c, sum_dy);
}
