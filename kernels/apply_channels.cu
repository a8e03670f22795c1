// Elementwise over arrays whose channels lie one after the other, a multiple of 8 of them: a thread keeps the
// coefficients of 8 channels and goes down `steps` positions, from the end of the array. See elementwise.cuh.
#include "elementwise.cuh"

using Acc = Format<ELEMENT>::Acc;

// Blocks of a multiprocessor, or more, that registers are left for.
constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 1 : OPERATION != NORMALIZE ? 2 : WRITES_BITS ? 3 : 4;

template <bool DENSE> __device__ __forceinline__ void apply(const Parameters& p) {
    const long long block = gridDim.x - 1 - blockIdx.x, across = block % p.blocks_across, down = block / p.blocks_across;
    const int lanes = static_cast<int>(p.lanes), at_once = blockDim.x / lanes;
    const long long c = (across * lanes + threadIdx.x % lanes) * OCTET;
    const long long rows = p.samples * p.positions; // as many as there are (sample, position)
    if (c >= p.channels) return;
    Coefficients<Acc> k[OCTET];
#pragma unroll
    for (int j = 0; j < OCTET; ++j) k[j] = load_coefficients<Acc>(p, c + j);
    const long long first = down * p.steps * at_once + threadIdx.x / lanes;
    for (int step = 0; step < p.steps; ++step) {
        const long long row = first + static_cast<long long>(step) * at_once;
        if (row >= rows) return;
        const long long octet = (row * p.channels + c) / OCTET;
        const auto offset = [&](const Operand& o) { return row * o.position + c; };
        const Offsets at{offset(p.x), offset(p.g), offset(p.y), offset(p.r)};
        Octets<ELEMENT> v;
        load_octets<DENSE>(p, at, octet, v);
#pragma unroll
        for (int j = 0; j < OCTET; ++j) {
            Element<Acc> element = v.at(j);
            compute<ELEMENT>(element, k[j]);
            v.put(j, element);
        }
        store_octets<DENSE>(p, at, octet, v);
    }
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) apply_channels(const __grid_constant__ Parameters p) {
    if (p.dense) apply<true>(p);
    else apply<false>(p);
}
