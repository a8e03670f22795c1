// y = the sum over the blocks of a cluster of their x, each thread's own, through distributed shared memory; and the
// faults of clusters. Launch: a grid of whole clusters, THREADS threads, 4 * THREADS shared bytes.

constexpr int none = 0, no_barrier_before = 1, no_barrier_after = 2, read_after_exit = 3, bad_rank = 4, bad_address = 5,
              one_block_absent = 6, early_write = 7;
constexpr int fault = FAULT;

struct Parameters {
    const int* x;
    int* y;
};

extern __shared__ __align__(16) unsigned char dynamic_bytes[];

extern "C" __global__ void exchange(const Parameters p) {
    __shared__ int low[THREADS];
    int* high = reinterpret_cast<int*>(dynamic_bytes);
    const int i = blockIdx.x * THREADS + threadIdx.x;

    low[threadIdx.x] = p.x[i] & 0xffff;
    high[threadIdx.x] = p.x[i] & ~0xffff;
    if (fault == one_block_absent && cluster_rank() == 1) return;
    if (fault != no_barrier_before) cluster_sync();
    int sum = 0;
    const int* mapped = cluster_map(low, (cluster_rank() + 1) % cluster_size());
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
        sum += cluster_map(low, fault == bad_rank ? rank + 1 : rank)[threadIdx.x];
        sum += cluster_map(fault == bad_address ? p.x : high, rank)[threadIdx.x];
    }
    if (fault == early_write) low[threadIdx.x] = -1;
    if (fault != no_barrier_after) cluster_sync();
    if (fault == read_after_exit) sum = mapped[threadIdx.x];
    p.y[i] = sum;
}
