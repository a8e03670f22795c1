// y = x with neighbours swapped in the lower half of each warp, then each warp reversed; the faults of a warp.
// Launch: any grid, THREADS threads. The halves meet unequally often before the whole warp does.

constexpr int none = 0, no_syncwarp = 1, two_masks = 2, two_operations = 3;
constexpr int fault = FAULT;

struct Parameters {
    const int* x;
    int* y;
};

extern "C" __global__ void warps(const Parameters p) {
    __shared__ int values[THREADS];
    const int t = threadIdx.x, i = blockIdx.x * THREADS + t;
    int value = p.x[i];
    if (t % 32 < 16) {
        for (int round = 0; round < 3; ++round) value = __shfl_xor_sync(0x0000ffffu, value, 1);
    }
    values[t] = value;
    if (fault == two_masks && t >= 16 && t < 32) {
        __syncwarp(0xffff0000u | 1);
    } else if (fault == two_operations && t == 3) {
        __ballot_sync(0xffffffffu, true);
    } else if (fault != no_syncwarp) {
        __syncwarp();
    }
    p.y[i] = values[t ^ 31];
}
