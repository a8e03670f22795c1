// What is done once for every channel: statistics, coefficients, running statistics, parameter gradients.
//
// -DACC=<float|double>: what the coefficients are kept in. A thread a channel.
#include "gradients.cuh"
#include "running.cuh"

#define CHANNEL_OR_RETURN                                                                                    \
    const long long c = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;                       \
    if (c >= p.channels) return

// gamma and beta as they are now.
extern "C" __global__ void keep(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    keep_parameters(p, c);
}

// Statistics from a root node (`from_count`, `first`, `second`).
extern "C" __global__ void statistics(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    const long long count = *reinterpret_cast<const long long*>(p.from_count);
    const double mean = reinterpret_cast<const double*>(p.first)[c], m2 = reinterpret_cast<const double*>(p.second)[c];
    store_statistics(p, c, statistics_of(mean, m2, count, p.eps));
    if (c == 0) *reinterpret_cast<long long*>(p.count) = count;
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

// Running statistics, and the counters.
extern "C" __global__ void update(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    update_running(p, c, load_running(p, c), load_statistics(p, c), *reinterpret_cast<const long long*>(p.count));
}

extern "C" __global__ void parameter_gradients(const __grid_constant__ Parameters p) {
    CHANNEL_OR_RETURN;
    store_parameter_gradients(p, c, reinterpret_cast<const double*>(p.first)[c], reinterpret_cast<const double*>(p.second)[c],
                              reinterpret_cast<const double*>(p.invstd)[c]);
}
