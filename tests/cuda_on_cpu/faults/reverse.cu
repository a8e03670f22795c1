// y[i] = x[i] reversed within each block, by way of static and dynamic shared memory; and the faults of one block.
// Launch: any grid, THREADS threads, 4 * THREADS shared bytes, n = grid * THREADS.

constexpr int none = 0, no_barrier = 1, half_barrier = 2, two_barriers = 3, return_before_barrier = 4, stopped = 5,
              uninitialized = 6, global_overrun = 7, global_underrun = 8, static_overrun = 9, dynamic_overrun = 10,
              misaligned = 11, overlapping_writes = 12, early_write = 13;
constexpr int fault = FAULT;

struct Parameters {
    const float* x;
    float* y;
    int n;
};

extern __shared__ __align__(16) unsigned char dynamic_bytes[];

extern "C" __global__ void __launch_bounds__(THREADS) reverse(const Parameters p) {
    __shared__ float staged[THREADS];
    float* forward = staged;
    float* backward = reinterpret_cast<float*>(dynamic_bytes);
    const int t = threadIdx.x, last = blockIdx.x == gridDim.x - 1 && t == THREADS - 1;
    const int i = blockIdx.x * THREADS + t;

    forward[fault == static_overrun ? t + last : t] = p.x[fault == global_underrun ? i - 1 : i];
    if (fault == return_before_barrier && t >= THREADS / 2) return;
    if (fault == half_barrier) {
        if (t < THREADS / 2) __syncthreads();
    } else if (fault == two_barriers && t >= THREADS / 2) {
        __syncthreads();
    } else if (fault != no_barrier) {
        __syncthreads();
    }
    if (fault == stopped && t == 5) __trap();
    if (fault != uninitialized || t != 7) {
        backward[fault == dynamic_overrun ? t + last : t] = forward[THREADS - 1 - t];
    }
    if (fault == early_write) forward[t] = 0;
    __syncthreads();
    p.y[fault == global_overrun ? i + last : i] = backward[t];
    if (fault == misaligned) reinterpret_cast<float2*>(p.y + 1)[0] = make_float2(0, 0);
    if (fault == overlapping_writes && t == 0) p.y[0] = p.x[THREADS - 1];
}
