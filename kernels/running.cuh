// Running statistics moved towards a batch's.
#pragma once
#include "coefficients.cuh"

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

// A channel that is not fit to be taken over stays as it was and is counted.
__device__ __forceinline__ void update_running(const Parameters& p, long long c, const Statistics& s, long long count) {
    long long* tracked = reinterpret_cast<long long*>(p.tracked) + c;
    long long* skipped = reinterpret_cast<long long*>(p.skipped) + c;
    const long long batches = *tracked + 1;
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
