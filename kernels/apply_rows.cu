// Elementwise over arrays whose positions lie one after the other: octets in the order of memory, from the end, so that
// what a reduction read last, which the caches still hold, comes first. `steps` octets a thread.
//
// With -DCROSSING=1 octets may run over the end of a row: then every operand is dense. -DINDEX=<unsigned|size_t>
// counts elements. The rest: elementwise.cuh.
#include "elementwise.cuh"

using Acc = Format<ELEMENT>::Acc;

constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 2 : 4; // of a multiprocessor, or more: registers are for these

// Octets within a row.
__device__ __forceinline__ void apply_inside(const Parameters& p, INDEX octet) {
    const INDEX e = octet * OCTET, S = static_cast<INDEX>(p.positions), C = static_cast<INDEX>(p.channels);
    const INDEX row = e / S, n = row / C;
    const long long position = e - row * S, c = row - n * C;
    const auto offset = [&](const Operand& o) { return n * o.sample + c * o.channel + position; };
    const Offsets at{offset(p.x), offset(p.g), offset(p.y), offset(p.r)};
    Octets<ELEMENT> v;
    load_octets(p, at, octet, v);
    const Coefficients<Acc> k = load_coefficients<Acc>(p, c);
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
        Element<ELEMENT> element = v.at(j);
        compute(element, k);
        v.put(j, element);
    }
    store_octets(p, at, octet, v);
}

// Octets of a dense array, whatever rows they touch; the last may be short.
__device__ __forceinline__ void apply_crossing(const Parameters& p, INDEX octet, INDEX elements) {
    const INDEX e = octet * OCTET, S = static_cast<INDEX>(p.positions), C = static_cast<INDEX>(p.channels);
    const INDEX row = e / S;
    INDEX position = e - row * S, c = row % C;
    Octets<ELEMENT> v;
    const Offsets at{(long long)e, (long long)e, (long long)e, (long long)e};
    const bool whole = e + OCTET <= elements;
    if (whole) load_octets(p, at, octet, v);
    else v.passed = READS_BITS ? reinterpret_cast<const unsigned char*>(p.bits)[octet] : 0;
    Coefficients<Acc> k = load_coefficients<Acc>(p, c);
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
        const long long i = e + j;
        if (!whole && i >= (long long)elements) break;
        const Offsets here{i, i, i, i};
        Element<ELEMENT> element = whole ? v.at(j) : load_element<ELEMENT>(p, here, v.passed >> j & 1);
        compute(element, k);
        v.put(j, element);
        if (!whole) store_element(p, here, element);
        if (++position == S) {
            position = 0;
            c = c + 1 == C ? 0 : c + 1;
            k = load_coefficients<Acc>(p, c);
        }
    }
    if (whole) store_octets(p, at, octet, v);
    else if (WRITES_BITS) reinterpret_cast<unsigned char*>(p.bits)[octet] = static_cast<unsigned char>(v.passed);
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) apply_rows(const __grid_constant__ Parameters p) {
    const INDEX elements = static_cast<INDEX>(p.samples * p.channels * p.positions);
    const INDEX octets = elements / OCTET + (elements % OCTET != 0);
    const INDEX block = gridDim.x - 1 - blockIdx.x;
    for (int step = 0; step < p.steps; ++step) {
        const INDEX octet = (block * static_cast<INDEX>(p.steps) + step) * blockDim.x + threadIdx.x;
        if (octet >= octets) return;
#if CROSSING
        apply_crossing(p, octet, elements);
#else
        apply_inside(p, octet);
#endif
    }
}
