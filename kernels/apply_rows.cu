// Elementwise over arrays whose positions lie one after the other: octets in the order of memory, from the end, so that
// what a reduction read last, which the caches still hold, comes first. `steps` octets a thread.
//
// -DCROSSING=<0|1|2>: octets stay within a row; they run over the ends of rows, of any number; of one at most. Where
// they do, operands fill their memory. -DINDEX=<unsigned|size_t> counts elements. The rest: elementwise.cuh.
#include "elementwise.cuh"

using Acc = Format<ELEMENT>::Acc;

// Blocks of a multiprocessor, or more, that registers are left for.
constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 2 : OPERATION == GRADIENT && CROSSING ? 3 : 4;

__device__ __forceinline__ INDEX quotient(INDEX n, const Divisor& by) {
    using Wide = unsigned long long;
    if (by.shift < 0) return n;
    if (sizeof(INDEX) == 4)
        return high_half(static_cast<unsigned>(n), static_cast<unsigned>(by.multiplier)) >> by.shift;
    return high_half(static_cast<Wide>(n), static_cast<Wide>(by.multiplier)) >> by.shift;
}

// Octets within a row.
template <bool DENSE> __device__ __forceinline__ void apply_inside(const Parameters& p, INDEX octet) {
    const INDEX e = octet * OCTET, row = quotient(e, p.over_positions), n = quotient(row, p.over_channels);
    const long long c = row - n * static_cast<INDEX>(p.channels);
    const auto offset = [&](const Operand& o) -> long long {
        if (DENSE) return e;
        return n * o.sample + c * o.channel + (e - row * static_cast<INDEX>(p.positions));
    };
    const Offsets at{offset(p.x), offset(p.g), offset(p.y), offset(p.r)};
    Octets<ELEMENT> v;
    load_octets<DENSE>(p, at, octet, v);
    const Coefficients<Acc> k = load_coefficients<Acc>(p, c);
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
        Element<Acc> element = v.at(j);
        compute<ELEMENT>(element, k);
        v.put(j, element);
    }
    store_octets<DENSE>(p, at, octet, v);
}

// The coefficients of the elements from one that is at `position` of channel c on.
struct Crossing {
    const Parameters& p;
    INDEX position, c;
    Coefficients<Acc> here;

    __device__ __forceinline__ Crossing(const Parameters& p, INDEX e) : p(p) {
        const INDEX row = quotient(e, p.over_positions);
        position = e - row * static_cast<INDEX>(p.positions);
        c = row - quotient(row, p.over_channels) * static_cast<INDEX>(p.channels);
        here = load_coefficients<Acc>(p, c);
    }
    __device__ __forceinline__ INDEX next() const { return c + 1 == static_cast<INDEX>(p.channels) ? 0 : c + 1; }
    __device__ __forceinline__ void step() {
        if (++position < static_cast<INDEX>(p.positions)) return;
        position = 0;
        c = next();
        here = load_coefficients<Acc>(p, c);
    }
};

// A whole octet of a dense array, whatever rows it touches.
template <bool DENSE> __device__ __forceinline__ void apply_crossing(const Parameters& p, INDEX octet) {
    const long long e = static_cast<long long>(octet * OCTET);
    const Offsets at{e, e, e, e};
    Octets<ELEMENT> v;
    load_octets<DENSE>(p, at, octet, v);
    Crossing k(p, octet * OCTET);
#if CROSSING == 2
    const INDEX left = static_cast<INDEX>(p.positions) - k.position; // elements of this row
    Coefficients<Acc> then = k.here;
    if (left < OCTET) then = load_coefficients<Acc>(p, k.next());
#endif
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
        Element<Acc> element = v.at(j);
#if CROSSING == 2
        compute<ELEMENT>(element, either(j < left, k.here, then));
#else
        compute<ELEMENT>(element, k.here);
        k.step();
#endif
        v.put(j, element);
    }
    store_octets<DENSE>(p, at, octet, v);
}

// The last octet, short of some elements.
__device__ __forceinline__ void apply_rest(const Parameters& p, INDEX octet, INDEX elements) {
    Crossing k(p, octet * OCTET);
    const unsigned read = READS_BITS ? reinterpret_cast<const unsigned char*>(p.bits)[octet] : 0;
    unsigned written = 0;
#pragma unroll 1
    for (int j = 0; octet * OCTET + j < elements; ++j, k.step()) {
        const long long e = static_cast<long long>(octet * OCTET + j);
        const Offsets at{e, e, e, e};
        Element<Acc> element = load_element<ELEMENT>(p, at, read >> j & 1);
        compute<ELEMENT>(element, k.here);
        store_element<ELEMENT>(p, at, element);
        written |= static_cast<unsigned>(element.passed) << j;
    }
    if (WRITES_BITS) reinterpret_cast<unsigned char*>(p.bits)[octet] = static_cast<unsigned char>(written);
}

template <bool DENSE> __device__ __forceinline__ void apply(const Parameters& p) {
    const INDEX elements = static_cast<INDEX>(p.samples * p.channels * p.positions);
    const INDEX octets = elements / OCTET + (elements % OCTET != 0);
    const INDEX block = gridDim.x - 1 - blockIdx.x;
    for (int step = 0; step < p.steps; ++step) {
        const INDEX octet = (block * static_cast<INDEX>(p.steps) + step) * blockDim.x + threadIdx.x;
        if (octet >= octets) return;
#if CROSSING
        if (octet * OCTET + OCTET <= elements) apply_crossing<DENSE>(p, octet);
        else apply_rest(p, octet, elements);
#else
        apply_inside<DENSE>(p, octet);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) apply_rows(const __grid_constant__ Parameters p) {
    if (p.dense) apply<true>(p);
    else apply<false>(p);
}
