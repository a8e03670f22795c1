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

// What follows from the root of a channel; `is_first` of the cluster's blocks writes it.
template <class Acc>
__device__ __forceinline__ void finish_channel(
    const Parameters& p, long long c, Node<double> root, bool is_first, Coefficients<Acc>& coefficients
) {
    long long* count = reinterpret_cast<long long*>(p.count);
#if OPERATION == NORMALIZE
    const long long values = p.samples * p.positions;
    const Statistics s = statistics_of(root.first, root.second, values, p.eps);
    coefficients = coefficients_of<Acc>(p, c, s);
    if (!is_first) return;
    store_statistics(p, c, s);
    if (c == 0) *count = values;
    keep_parameters(p, c);
    if (p.tracked) update_running(p, c, s, values);
#else
    const double invstd = reinterpret_cast<const double*>(p.invstd)[c];
    add_gradient(coefficients, root.first, root.second, *count, invstd);
    if (!is_first) return;
    reinterpret_cast<double*>(p.first)[c] = root.first;
    reinterpret_cast<double*>(p.second)[c] = root.second;
    store_parameter_gradients(p, c, root.first, root.second, invstd);
#endif
}
