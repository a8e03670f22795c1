// What batch renormalisation does once for every channel: r and d, and its parameter gradients. A thread a channel.
//
// A renormalised batch is a plain one with gamma * r and beta + gamma * d in the place of gamma and beta.
#include "gradients.cuh"

#define CHANNEL_OR_RETURN                                                                                    \
    const long long c = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;                       \
    if (c >= p.channels) return

EXACT double clipped(double v, double low, double high) { // a NaN stays
    return at_most(v, low) ? low : at_most(high, v) ? high : v;
}

EXACT double negated(double v) { return subtract(0.0, v); }

// mean and invstd are the batch's; old_mean, old_var and `first`, 1 / sqrt(old_var + eps), those of running statistics
// in float64. `momentum` is r_max and `eps` d_max. Written are r and d, to node_first and node_second, and what takes
// the place of gamma and beta, which may be their own.
extern "C" __global__ void renormalise(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    const double mean = load_parameter(p.old_mean, c, 0.0), var = load_parameter(p.old_var, c, 0.0);
    const double invstd = reinterpret_cast<const double*>(p.first)[c];
    const bool usable = is_finite(mean) && is_finite(var) && is_finite(invstd);
    const double ratio = divide(invstd, reinterpret_cast<const double*>(p.invstd)[c]);
    const double distance = multiply(subtract(reinterpret_cast<const double*>(p.mean)[c], mean), invstd);
    const double r = usable ? clipped(ratio, divide(1.0, p.momentum), p.momentum) : 1.0;
    const double d = usable ? clipped(distance, negated(p.eps), p.eps) : 0.0;
    const double gamma = load_parameter(p.gamma, c, 1.0), beta = load_parameter(p.beta, c, 0.0);
    reinterpret_cast<double*>(p.node_first)[c] = r;
    reinterpret_cast<double*>(p.node_second)[c] = d;
    reinterpret_cast<double*>(p.kept_gamma)[c] = multiply(gamma, r);
    reinterpret_cast<double*>(p.kept_beta)[c] = add(beta, multiply(gamma, d));
}

// r is in from_first, d in from_second.
extern "C" __global__ void renormalised_gradients(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    const double r = reinterpret_cast<const double*>(p.from_first)[c], d = reinterpret_cast<const double*>(p.from_second)[c];
    const double sum_dy = reinterpret_cast<const double*>(p.first)[c], sum_dy_xmu = reinterpret_cast<const double*>(p.second)[c];
    const double by_xhat = multiply(sum_dy_xmu, reinterpret_cast<const double*>(p.invstd)[c]);
    store_gradient(p.dgamma, c, add(multiply(r, by_xhat), multiply(d, sum_dy)));
    store_gradient(p.dbeta, c, sum_dy);
}
