// The root of the tree over nodes that ranks sent one another: (count, first, second) of all rows of a table.
//
// A row is a node as it travels: its count (int64), `channels` firsts, `channels` seconds. Rows are taken from left to
// right and put on a stack; `merges` says how often its last two nodes then become one, so any cut makes the one tree.
// A thread a channel, blocks of a warp. The last node of the stack is in registers; those that wait are in shared
// memory, 24 bytes each. Bytes moved: 16 a node and channel. There are few, so latency counts: the next row is under way
// while this one is merged. Planned by `plan.root`.
//
// -DKIND=<Moments|Sums>
#include "tree.cuh"

constexpr int THREADS = 32;

__device__ __forceinline__ CountedNode row_of(const Parameters& p, long long row, long long c) {
    const double* at = reinterpret_cast<const double*>(p.table) + row * p.table_step;
    return {{at[1 + c], at[1 + p.channels + c]}, *reinterpret_cast<const long long*>(at)};
}

extern "C" __global__ void __launch_bounds__(THREADS) root(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    CountedNode* waiting = reinterpret_cast<CountedNode*>(memory) + threadIdx.x;
    const long long c = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (c >= p.channels) return; // there is no barrier
    int below = 0;               // nodes that wait
    CountedNode last = {{0.0, 0.0}, 0};
    CountedNode next = p.table_rows ? row_of(p, 0, c) : last;
    for (long long row = 0; row < p.table_rows; ++row) {
        if (row) waiting[THREADS * below++] = last;
        last = next;
        if (row + 1 < p.table_rows) next = row_of(p, row + 1, c);
        for (long long m = reinterpret_cast<const long long*>(p.merges)[row]; m > 0; --m)
            last = merge_counted<KIND>(waiting[THREADS * --below], last);
    }
    reinterpret_cast<double*>(p.first)[c] = last.node.first;
    reinterpret_cast<double*>(p.second)[c] = last.node.second;
    if (c == 0) *reinterpret_cast<long long*>(p.count) = last.count;
}
