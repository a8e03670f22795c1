// Elementwise over arrays whose channels lie one after the other, a multiple of 8 of them: a thread keeps the
// coefficients of 8 channels and goes down `steps` positions, from the end of the array. See elementwise.cuh.
#include "positions.cuh"

// Blocks of a multiprocessor, or more, that registers are left for.
constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 1 : OPERATION != NORMALIZE ? 2 : WRITES_BITS ? 3 : 4;

template <bool DENSE> __device__ __forceinline__ void apply(const Parameters& p) {
    const long long block = gridDim.x - 1 - blockIdx.x, across = block % p.blocks_across, down = block / p.blocks_across;
    const int lanes = static_cast<int>(p.lanes), at_once = blockDim.x / lanes;
    const long long c = (across * lanes + threadIdx.x % lanes) * OCTET;
    const long long rows = p.samples * p.positions; // as many as there are (sample, position)
    const long long first = down * p.steps * at_once, end = first + p.steps * at_once;
    apply_positions<DENSE, 1>(p, c, first + threadIdx.x / lanes, end < rows ? end : rows, at_once);
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) apply_channels(const __grid_constant__ Parameters p) {
    if (p.dense) apply<true>(p);
    else apply<false>(p);
}
