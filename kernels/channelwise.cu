// What is done once for every channel: statistics, coefficients, running statistics, parameter gradients.
//
// -DACC=<float|double>: what the coefficients are kept in. A thread a channel.
#include "coefficients.cuh"

#define CHANNEL_OR_RETURN                                                                                    \
    const long long c = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;                       \
    if (c >= p.channels) return

// A parameter (`gamma`) of any format in double.
extern "C" __global__ void widen(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    reinterpret_cast<double*>(p.first)[c] = load_parameter(p.gamma, c, 0.0);
}

// Statistics from a root node (`count`, `first`, `second`).
extern "C" __global__ void statistics(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    const long long count = *reinterpret_cast<const long long*>(p.count);
    const double mean = reinterpret_cast<const double*>(p.first)[c], m2 = reinterpret_cast<const double*>(p.second)[c];
    store_statistics(p, c, statistics_of(mean, m2, count, p.eps));
}

// Statistics from running ones; and, where asked for, the coefficients.
extern "C" __global__ void frozen(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    const double mean = load_parameter(p.old_mean, c, 0.0), var = load_parameter(p.old_var, c, 0.0);
    const Statistics s{mean, 0.0, var, invstd_of(var, p.eps)};
    if (p.mean) store_statistics(p, c, s);
    if (p.coefficients) store_coefficients(p, c, coefficients_of<ACC>(p, c, s));
    if (p.count && c == 0) *reinterpret_cast<long long*>(p.count) = 0;
}

extern "C" __global__ void coefficients(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    store_coefficients(p, c, coefficients_of<ACC>(p, c, load_statistics(p, c)));
}

// k1 and k2 from the sums.
extern "C" __global__ void gradient_coefficients(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    Coefficients<ACC> k = load_coefficients<ACC>(p, c);
    add_gradient(k, reinterpret_cast<const double*>(p.first)[c], reinterpret_cast<const double*>(p.second)[c],
                 *reinterpret_cast<const long long*>(p.count), reinterpret_cast<const double*>(p.invstd)[c]);
    store_coefficients(p, c, k);
}

// (1 - w) * old + w * value, rounded once to the format of the running statistics (float32 or float64).
__device__ __forceinline__ double moved(double old, double value, double w, long long format) {
    const double r = add(multiply(subtract(1.0, w), old), multiply(w, value));
    return format == 3 ? to_double(to_float(r)) : r;
}

__device__ __forceinline__ void store_running(const Vector& v, long long c, double value) {
    if (v.format == 3)
        reinterpret_cast<float*>(v.pointer)[c * v.stride] = to_float(value);
    else
        reinterpret_cast<double*>(v.pointer)[c * v.stride] = value;
}

// Running statistics, and the counters: a channel that is not fit to be taken over stays as it was and is counted.
extern "C" __global__ void update(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    long long* tracked = reinterpret_cast<long long*>(p.tracked) + c;
    long long* skipped = reinterpret_cast<long long*>(p.skipped) + c;
    const long long count = *reinterpret_cast<const long long*>(p.count), batches = *tracked + 1;
    const Statistics s = load_statistics(p, c);
    const double w = p.cumulative ? divide(1.0, from_integer(batches - *skipped)) : p.momentum;
    const double unbiased = divide(s.m2, from_integer(count - 1));
    const double old_mean = load_parameter(p.old_mean, c, 0.0), old_var = load_parameter(p.old_var, c, 0.0);
    const double mean = moved(old_mean, s.mean, w, p.old_mean.format), var = moved(old_var, unbiased, w, p.old_var.format);
    const bool kept = count >= 2 && is_finite(s.mean) && is_finite(s.var) && is_finite(unbiased) && is_finite(mean) &&
                      is_finite(var);
    store_running(p.new_mean, c, kept ? mean : old_mean);
    store_running(p.new_var, c, kept ? var : old_var);
    *tracked = batches;
    if (!kept) *skipped += 1;
}

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

extern "C" __global__ void parameter_gradients(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    const double invstd = reinterpret_cast<const double*>(p.invstd)[c];
    store_gradient(p.gamma, c, multiply(reinterpret_cast<const double*>(p.second)[c], invstd));
    store_gradient(p.beta, c, reinterpret_cast<const double*>(p.first)[c]);
}
