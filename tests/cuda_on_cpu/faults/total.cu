// y[0] = the sum of x, by shuffles, shared memory and the last block to finish; and the faults between blocks.
// Launch: any grid, a multiple of 32 up to 1024 threads, no dynamic shared memory, tickets = 0, n = grid * threads.

constexpr int none = 0, no_fence_before = 1, no_fence_after = 2, plain_ticket = 3;
constexpr int fault = FAULT;

struct Parameters {
    const long long* x;
    long long* y;
    long long* partial;
    unsigned* tickets;
};

__device__ long long block_sum(long long value) {
    __shared__ long long sums[32];
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    long long sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += sums[warp];
    __syncthreads();
    return sum;
}

extern "C" __global__ void total(const Parameters p) {
    __shared__ bool last;
    const long long sum = block_sum(p.x[blockIdx.x * blockDim.x + threadIdx.x]);
    if (threadIdx.x == 0) {
        p.partial[blockIdx.x] = sum;
        if (fault != no_fence_before) __threadfence();
        last = (fault == plain_ticket ? (*p.tickets)++ : atomicAdd(p.tickets, 1)) == gridDim.x - 1;
        if (fault != no_fence_after) __threadfence();
    }
    __syncthreads();
    if (!last) return;
    long long value = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) value += p.partial[block];
    value = block_sum(value);
    if (threadIdx.x == 0) p.y[0] = value;
}
