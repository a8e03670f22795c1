// Rows of nodes merged, `merged` rows into one, until few are left; then `finish` makes them one and says what follows.
//
// A block works on `group` channels. -DKIND=<Moments|Sums> -DACC=<float|double>
#include "gradients.cuh"
#include "span.cuh"

// Blocks of a multiprocessor, or more, that registers are left for.
constexpr int BLOCKS = 4;

// Rows [first, first + rows) of `group` channels from c0 on, merged in shared memory; node g * rows is channel c0 + g's.
__device__ long long merged(
    const Parameters& p, long long first, int rows, long long c0, Node<double>* nodes, long long* values
) {
    const int channels = static_cast<int>(p.group);
    for (int k = threadIdx.x; k < rows * channels; k += blockDim.x) {
        const int r = k / channels, g = k % channels;
        const long long at = (first + r) * p.channels + c0 + g;
        if (c0 + g < p.channels)
            nodes[g * rows + r] = {reinterpret_cast<const double*>(p.from_first)[at],
                                   reinterpret_cast<const double*>(p.from_second)[at]};
    }
    for (int r = threadIdx.x; r < rows; r += blockDim.x)
        values[r] = reinterpret_cast<const long long*>(p.from_count)[first + r];
    merge_counted_span<KIND>(nodes, values, rows, channels);
    return values[0];
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) merge_rows(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Node<double>* nodes = reinterpret_cast<Node<double>*>(memory);
    const long long c0 = blockIdx.x % p.blocks_across * p.group, row = blockIdx.x / p.blocks_across;
    const long long first = row * p.merged, left = p.from_rows - first;
    const int rows = static_cast<int>(left < p.merged ? left : p.merged);
    const long long count =
        merged(p, first, rows, c0, nodes, reinterpret_cast<long long*>(nodes + rows * p.group));
    for (int g = threadIdx.x; g < p.group && c0 + g < p.channels; g += blockDim.x) {
        reinterpret_cast<double*>(p.node_first)[row * p.channels + c0 + g] = nodes[g * rows].first;
        reinterpret_cast<double*>(p.node_second)[row * p.channels + c0 + g] = nodes[g * rows].second;
    }
    if (c0 == 0 && threadIdx.x == 0) reinterpret_cast<long long*>(p.node_count)[row] = count;
}

__device__ __forceinline__ void finish_channel(const Parameters& p, long long c, Node<double> root, long long count) {
#if FINISH_MOMENTS
    const Statistics s = statistics_of(root.first, root.second, count, p.eps);
    store_statistics(p, c, s);
    store_coefficients(p, c, coefficients_of<ACC>(p, c, s));
    keep_parameters(p, c);
#else
    reinterpret_cast<double*>(p.first)[c] = root.first;
    reinterpret_cast<double*>(p.second)[c] = root.second;
    Coefficients<ACC> k = load_coefficients<ACC>(p, c);
    const double invstd = reinterpret_cast<const double*>(p.invstd)[c];
    add_gradient(k, root.first, root.second, *reinterpret_cast<const long long*>(p.count), invstd);
    store_coefficients(p, c, k);
    store_parameter_gradients(p, c, root.first, root.second, invstd);
#endif
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) finish(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Node<double>* nodes = reinterpret_cast<Node<double>*>(memory);
    const long long c0 = blockIdx.x * p.group;
    const int rows = static_cast<int>(p.from_rows);
    const long long count = merged(p, 0, rows, c0, nodes, reinterpret_cast<long long*>(nodes + rows * p.group));
#if FINISH_MOMENTS
    if (c0 == 0 && threadIdx.x == 0) *reinterpret_cast<long long*>(p.count) = count;
#endif
    for (int g = threadIdx.x; g < p.group && c0 + g < p.channels; g += blockDim.x)
        finish_channel(p, c0 + g, nodes[g * rows], count);
}
