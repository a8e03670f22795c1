// Running statistics moved towards a batch's.
#pragma once
#include "coefficients.cuh"

// A channel's running statistics and counters as they are.
struct Running {
    double mean, var;
    long long tracked, skipped;
};

__device__ __forceinline__ Running load_running(const Parameters& p, long long c) {
    return {load_parameter(p.old_mean, c, 0.0), load_parameter(p.old_var, c, 0.0),
            reinterpret_cast<const long long*>(p.tracked)[c], reinterpret_cast<const long long*>(p.skipped)[c]};
}

// (1 - w) * old + w * value, or the value alone, rounded once to the format of the running statistics (float32 or
// float64).
__device__ __forceinline__ double moved(double old, double value, double w, bool alone, long long format) {
    const double r = alone ? value : add(multiply(subtract(1.0, w), old), multiply(w, value));
    return format == 3 ? to_double(to_float(r)) : r;
}

__device__ __forceinline__ void store_running(const Vector& v, long long c, double value) {
    if (v.format == 3)
        reinterpret_cast<float*>(v.pointer)[c * v.stride] = to_float(value);
    else
        reinterpret_cast<double*>(v.pointer)[c * v.stride] = value;
}

// A channel that is not fit to be taken over stays as it was and is counted. Old values that are not finite give way to
// new ones, as does everything at a weight of 1.
__device__ __forceinline__ void update_running(
    const Parameters& p, long long c, const Running& old, const Statistics& s, long long count
) {
    long long& tracked = reinterpret_cast<long long*>(p.tracked)[c];
    long long& skipped = reinterpret_cast<long long*>(p.skipped)[c];
    const long long batches = old.tracked + 1;
    const double w = p.cumulative ? divide(1.0, from_integer(batches - old.skipped)) : p.momentum;
    const bool full = bits_of(w) == bits_of(1.0);
    const bool heals = bits_of(w) != bits_of(0.0) && !(is_finite(old.mean) && is_finite(old.var));
    const double mean = moved(old.mean, s.mean, w, full || heals, p.old_mean.format);
    const double var = moved(old.var, divide(s.m2, from_integer(count - p.ddof)), w, full || heals, p.old_var.format);
    const bool kept = count >= 2 && is_finite(mean) && is_finite(var);
    store_running(p.new_mean, c, kept ? mean : old.mean);
    store_running(p.new_var, c, kept ? var : old.var);
    if (p.cumulative && kept && heals && !full) { // its average begins anew
        tracked = 1;
        skipped = 0;
    } else {
        tracked = batches;
        if (!kept) skipped = old.skipped + 1;
    }
}
