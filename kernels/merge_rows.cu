// Rows of nodes merged, `merged` rows into one, until few are left; then `finish` makes them one and says what follows.
//
// A block works on `group` channels, a power of two: neighbouring threads have neighbouring channels, of RUN rows at a
// time, which they merge in registers; the rest of the tree is in shared memory, a node of each channel for each RUN rows.
// -DKIND=<Moments|Sums> -DACC=<float|double> -DFINISH_MOMENTS=<0|1>
#include "gradients.cuh"
#include "span.cuh"

// Blocks of a multiprocessor, or more, that registers are left for.
constexpr int BLOCKS = 2;

constexpr int RUN = 4; // see MERGED_RUN in the planner

// Where a thread is among those of a block.
struct Place {
    int group, channel; // of the group
    int worker, workers; // that share a channel
    __device__ __forceinline__ explicit Place(const Parameters& p)
        : group(static_cast<int>(p.group)), channel(threadIdx.x & (group - 1)), worker(threadIdx.x / group),
          workers(blockDim.x / group) {}
};

__device__ __forceinline__ CountedNode row_of(const Parameters& p, long long row, long long c) {
    const long long at = row * p.channels + c;
    return {{reinterpret_cast<const double*>(p.from_first)[at], reinterpret_cast<const double*>(p.from_second)[at]},
            reinterpret_cast<const long long*>(p.from_count)[row]};
}

// Rows [first, first + rows) of a channel merged, to its first worker.
__device__ __forceinline__ CountedNode merged(
    const Parameters& p, const Place& at, long long first, int rows, long long c, CountedNode* nodes
) {
    const int runs = (rows + RUN - 1) / RUN;
    nodes += at.channel;
    for (int i = at.worker; i < runs; i += at.workers) {
        CountedNode n[RUN];
#pragma unroll
        for (int k = 0; k < RUN; ++k) {
            const int r = i * RUN + k;
            n[k] = r < rows && c < p.channels ? row_of(p, first + r, c) : CountedNode{};
        }
#pragma unroll
        for (int size = 1; size < RUN; size *= 2)
#pragma unroll
            for (int k = 0; k < RUN; k += 2 * size) n[k] = merge_counted<KIND>(n[k], n[k + size]);
        nodes[i * at.group] = n[0];
    }
    for (int size = 1; size < runs; size *= 2) {
        __syncthreads();
        for (int left = 2 * size * at.worker; left + size < runs; left += 2 * size * at.workers)
            nodes[left * at.group] = merge_counted<KIND>(nodes[left * at.group], nodes[(left + size) * at.group]);
    }
    return at.worker == 0 ? nodes[0] : CountedNode{}; // which that worker has written itself
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) merge_rows(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Place at(p);
    const long long c = blockIdx.x % p.blocks_across * p.group + at.channel, row = blockIdx.x / p.blocks_across;
    const long long first = row * p.merged, left = p.from_rows - first;
    const int rows = static_cast<int>(left < p.merged ? left : p.merged);
    const CountedNode root = merged(p, at, first, rows, c, reinterpret_cast<CountedNode*>(memory));
    if (at.worker || c >= p.channels) return;
    reinterpret_cast<double*>(p.node_first)[row * p.channels + c] = root.node.first;
    reinterpret_cast<double*>(p.node_second)[row * p.channels + c] = root.node.second;
    if (c == 0) reinterpret_cast<long long*>(p.node_count)[row] = root.count;
}

// What follows from the root of a channel. All else that this needs is loaded before there is a root.
struct Channel {
    Coefficients<ACC> k;
#if FINISH_MOMENTS
    __device__ __forceinline__ void load(const Parameters& p, long long c) { k = load_affine<ACC>(p, c); }
    __device__ __forceinline__ void finish(const Parameters& p, long long c, const CountedNode& root) {
        const Statistics s = statistics_of(root.node.first, root.node.second, root.count, p.eps);
        add_statistics(k, s);
        store_coefficients(p, c, k);
        store_statistics(p, c, s);
        keep_parameters(p, c);
        if (c == 0) *reinterpret_cast<long long*>(p.count) = root.count;
    }
#else
    double invstd;
    long long count;
    __device__ __forceinline__ void load(const Parameters& p, long long c) {
        k = load_coefficients<ACC>(p, c);
        invstd = reinterpret_cast<const double*>(p.invstd)[c];
        count = *reinterpret_cast<const long long*>(p.count);
    }
    __device__ __forceinline__ void finish(const Parameters& p, long long c, const CountedNode& root) {
        const Node<double>& sums = root.node;
        add_gradient(k, sums.first, sums.second, count, invstd);
        store_coefficients(p, c, k);
        reinterpret_cast<double*>(p.first)[c] = sums.first;
        reinterpret_cast<double*>(p.second)[c] = sums.second;
        store_parameter_gradients(p, c, sums.first, sums.second, invstd);
    }
#endif
};

extern "C" __global__ void __launch_bounds__(256, BLOCKS) finish(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Place at(p);
    const long long c = blockIdx.x * p.group + at.channel;
    const bool has_own = at.worker == 0 && c < p.channels;
    Channel channel{};
    if (has_own) channel.load(p, c);
    const int rows = static_cast<int>(p.from_rows);
    const CountedNode root = merged(p, at, 0, rows, c, reinterpret_cast<CountedNode*>(memory));
    if (has_own) channel.finish(p, c, root);
}
