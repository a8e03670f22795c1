// From statistics to what elementwise code needs of a channel.
#pragma once
#include "formats.cuh"
#include "parameters.cuh"

template <class Acc> struct alignas(16) Coefficients {
    Acc high, low, scale, beta, k1, k2;
};

template <class Acc>
EXACT Coefficients<Acc> either(bool first, const Coefficients<Acc>& a, const Coefficients<Acc>& b) {
    return {first ? a.high : b.high, first ? a.low : b.low, first ? a.scale : b.scale,
            first ? a.beta : b.beta, first ? a.k1 : b.k1,   first ? a.k2 : b.k2};
}

template <class Acc> EXACT Acc centre(Acc x, const Coefficients<Acc>& c) {
    return subtract(subtract(x, c.high), c.low);
}

template <class Acc> EXACT Acc normalized(Acc x, const Coefficients<Acc>& c) {
    return add(multiply(centre(x, c), c.scale), c.beta);
}

template <class Acc> EXACT Acc input_gradient(Acc dy, Acc x, const Coefficients<Acc>& c) {
    return multiply(subtract(subtract(dy, c.k1), multiply(centre(x, c), c.k2)), c.scale);
}

template <class Acc> EXACT Acc combined(Acc g, Acc x, const Coefficients<Acc>& c) {
    return add(add(multiply(g, c.scale), multiply(centre(x, c), c.k1)), c.k2);
}

template <class Acc> EXACT Acc relu(Acc v) { return zero_where_at_most(v, v, Acc(0)); } // a NaN stays

// dy behind a ReLU that stopped what y, recomputed from x and rounded, is not positive.
template <class T, class Acc> EXACT Acc recomputed_gate(Acc dy, Acc x, const Coefficients<Acc>& c) {
    return zero_where_at_most(dy, normalized(x, c), Format<T>::rounds_to_zero());
}

// A parameter of any format, or what stands for an absent one.
__device__ __forceinline__ double load_parameter(const Vector& v, long long channel, double absent) {
    const long long i = channel * v.stride;
    switch (v.format) {
    case 1: return to_double(Format<float16>::widen(reinterpret_cast<const float16*>(v.pointer)[i]));
    case 2: return to_double(Format<bfloat16>::widen(reinterpret_cast<const bfloat16*>(v.pointer)[i]));
    case 3: return to_double(reinterpret_cast<const float*>(v.pointer)[i]);
    case 4: return reinterpret_cast<const double*>(v.pointer)[i];
    default: return absent;
    }
}

// Copies of gamma and beta, where they are asked for.
__device__ __forceinline__ void keep_parameters(const Parameters& p, long long channel) {
    if (p.kept_gamma) reinterpret_cast<double*>(p.kept_gamma)[channel] = load_parameter(p.gamma, channel, 0.0);
    if (p.kept_beta) reinterpret_cast<double*>(p.kept_beta)[channel] = load_parameter(p.beta, channel, 0.0);
}

struct Statistics {
    double mean, m2, var, invstd;
};

EXACT double invstd_of(double var, double eps) { return divide(1.0, square_root(add(var, eps))); }

EXACT Statistics statistics_of(double mean, double m2, long long count, double eps) {
    const double var = divide(m2, from_integer(count));
    return {mean, m2, var, invstd_of(var, eps)};
}

__device__ __forceinline__ void store_statistics(const Parameters& p, long long channel, const Statistics& s) {
    reinterpret_cast<double*>(p.mean)[channel] = s.mean;
    reinterpret_cast<double*>(p.m2)[channel] = s.m2;
    reinterpret_cast<double*>(p.var)[channel] = s.var;
    reinterpret_cast<double*>(p.invstd)[channel] = s.invstd;
}

__device__ __forceinline__ Statistics load_statistics(const Parameters& p, long long channel) {
    return {reinterpret_cast<const double*>(p.mean)[channel], reinterpret_cast<const double*>(p.m2)[channel],
            reinterpret_cast<const double*>(p.var)[channel], reinterpret_cast<const double*>(p.invstd)[channel]};
}

// gamma, as the scale of an invstd of 1, and beta: what does not wait for statistics.
template <class Acc> __device__ __forceinline__ Coefficients<Acc> load_affine(const Parameters& p, long long channel) {
    const double gamma = load_parameter(p.gamma, channel, 1.0), beta = load_parameter(p.beta, channel, 0.0);
    return {Acc(0), Acc(0), Rounded<Acc>::from(gamma), Rounded<Acc>::from(beta), Acc(0), Acc(0)};
}

// high, low and scale; k1 and k2 are the backward's.
template <class Acc> EXACT void add_statistics(Coefficients<Acc>& c, const Statistics& s) {
    c.high = Rounded<Acc>::from(s.mean);
    c.low = Rounded<Acc>::from(subtract(s.mean, to_double(c.high)));
    c.scale = multiply(Rounded<Acc>::from(s.invstd), c.scale);
}

template <class Acc>
__device__ __forceinline__ Coefficients<Acc> coefficients_of(const Parameters& p, long long channel, const Statistics& s) {
    Coefficients<Acc> c = load_affine<Acc>(p, channel);
    add_statistics(c, s);
    return c;
}

template <class Acc>
EXACT void add_gradient(Coefficients<Acc>& c, double sum_dy, double sum_dy_xmu, long long count, double invstd) {
    const double values = from_integer(count);
    c.k1 = Rounded<Acc>::from(divide(sum_dy, values));
    c.k2 = Rounded<Acc>::from(multiply(divide(sum_dy_xmu, values), multiply(invstd, invstd)));
}

template <class Acc>
__device__ __forceinline__ void store_coefficients(const Parameters& p, long long channel, const Coefficients<Acc>& c) {
    reinterpret_cast<Coefficients<Acc>*>(p.coefficients)[channel] = c;
}

template <class Acc>
__device__ __forceinline__ Coefficients<Acc> load_coefficients(const Parameters& p, long long channel) {
    return reinterpret_cast<const Coefficients<Acc>*>(p.coefficients)[channel];
}
