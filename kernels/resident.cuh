// What resident kernels do between reading and writing: make one root of the cluster's nodes, and of that what follows.
//
// -DTHREADS -DCLUSTER=<1|2|4|8>, and what elementwise.cuh asks for.
#pragma once
#include "cluster.cuh"
#include "elementwise.cuh"
#include "gradients.cuh"
#include "running.cuh"
#include "span.cuh"

#if OPERATION == NORMALIZE
#define KIND Moments
constexpr int STAGED = 1; // operands in shared memory: x, and dy
#else
#define KIND Sums
constexpr int STAGED = 2;
#endif

// The roots of the cluster's channels, CLUSTER nodes from one another, from those that its blocks have in `nodes`,
// `apart` nodes from one another.
__device__ __forceinline__ void merge_cluster(
    const Parameters& p, const Span& s, const Node<double>* nodes, int apart, Node<double>* roots
) {
#if CLUSTER > 1
    cluster_sync();
    for (int k = threadIdx.x; k < CLUSTER * s.group; k += THREADS)
        roots[k] = cluster_map(nodes, k % CLUSTER)[k / CLUSTER * apart];
    merge_span<KIND>(p, {CLUSTER, s.group, s.first_channel, 0, 0}, roots, p.span);
#endif
}

// What a channel's coefficients are before its root is known: of a gradient, all that its sums need.
template <class Acc> __device__ __forceinline__ Coefficients<Acc> known_coefficients(const Parameters& p, long long c) {
#if OPERATION == NORMALIZE
    return load_affine<Acc>(p, c);
#else
    return coefficients_of<Acc>(p, c, load_statistics(p, c));
#endif
}

// A channel, to the one thread that finishes it: memory answers while nodes are merged; then come the coefficients, for
// which the block waits; all that nobody waits for comes behind them.
struct Channel {
    long long c, count;
#if OPERATION == NORMALIZE
    Running running;
    Statistics statistics;

    // What the root is not needed for; `updates`: running statistics too.
    __device__ __forceinline__ void load(const Parameters& p, long long channel, bool updates) {
        c = channel;
        count = p.samples * p.positions;
        if (updates && p.tracked) running = load_running(p, c);
    }
    template <class Acc>
    __device__ __forceinline__ void finish(const Parameters& p, Node<double> root, Coefficients<Acc>& coefficients) {
        statistics = statistics_of(root.first, root.second, count, p.eps);
        add_statistics(coefficients, statistics);
    }
    __device__ __forceinline__ void store(const Parameters& p) const {
        store_statistics(p, c, statistics);
        if (c == 0) *reinterpret_cast<long long*>(p.count) = count;
        keep_parameters(p, c);
        if (p.tracked) update_running(p, c, running, statistics, count);
    }
#else
    double invstd;
    Node<double> sums;

    __device__ __forceinline__ void load(const Parameters& p, long long channel, bool) {
        c = channel;
        count = *reinterpret_cast<const long long*>(p.count);
        invstd = reinterpret_cast<const double*>(p.invstd)[c];
    }
    template <class Acc>
    __device__ __forceinline__ void finish(const Parameters&, Node<double> root, Coefficients<Acc>& coefficients) {
        sums = root;
        add_gradient(coefficients, sums.first, sums.second, count, invstd);
    }
    __device__ __forceinline__ void store(const Parameters& p) const {
        reinterpret_cast<double*>(p.first)[c] = sums.first;
        reinterpret_cast<double*>(p.second)[c] = sums.second;
        store_parameter_gradients(p, c, sums.first, sums.second, invstd);
    }
#endif
};
