// Where the values of a tile are: reader(position in the tile, how many are valid) -> terms. See tile.cuh.
#pragma once
#include "coefficients.cuh"
#include "tile.cuh"

enum GateKind { GATE_NONE, GATE_RECOMPUTE, GATE_BITS };

// Up to eight bits, from bit `i` on; no byte is read that has none of them.
__device__ __forceinline__ unsigned load_bits(const unsigned char* bits, long long i, int count) {
    const unsigned char* from = bits + (i >> 3);
    const int shift = static_cast<int>(i & 7);
    return (shift + count > 8 ? from[0] | from[1] << 8 : from[0]) >> shift;
}

// dy behind a ReLU.
template <class T, int Gate, class Acc>
__device__ __forceinline__ Acc gate(Acc x, Acc dy, bool passed, const Coefficients<Acc>& c) {
    if (Gate == GATE_RECOMPUTE) return recomputed_gate<T>(dy, x, c);
    return Gate == GATE_BITS && !passed ? Acc(0) : dy;
}

// The same, and its product with x - mean.
template <class T, int Gate, class Acc>
__device__ __forceinline__ Node<Acc> terms_of(Acc x, Acc dy, bool passed, const Coefficients<Acc>& c) {
    const Acc gated = gate<T, Gate>(x, dy, passed, c);
    return {gated, multiply(gated, centre(x, c))};
}

// Whether elements from p on, `positions` of them a row, can be read by fours: 16-bit ones, where vectors do not fit.
template <class T> __device__ __forceinline__ bool has_fours(const T* p, long long positions) {
    return sizeof(T) == 2 && reinterpret_cast<unsigned long long>(p) % sizeof(uint2) == 0 && positions % 4 == 0;
}

// As many of eight elements as are valid, and zeros.
template <class T>
__device__ __forceinline__ void read_valid(const T* p, int valid, bool fours, typename Format<T>::Acc (&v)[OCTET]) {
    Octet<T> octet;
    if (sizeof(T) == 2 && fours) {
        octet.fours[0] = valid > 0 ? reinterpret_cast<const uint2*>(p)[0] : uint2{};
        octet.fours[1] = valid > 4 ? reinterpret_cast<const uint2*>(p)[1] : uint2{};
    } else {
#pragma unroll
        for (int j = 0; j < OCTET; ++j) octet.v[j] = j < valid ? p[j] : T{};
    }
    to_numbers(octet, v);
}

// Positions one after the other, in global or shared memory.
template <class T> struct Contiguous {
    using Acc = typename Format<T>::Acc;
    const T* x;
    bool aligned, fours;

    __device__ __forceinline__ bool is_aligned() const { return aligned; }

    template <bool WHOLE> __device__ __forceinline__ void read(int position, int valid, MomentTerms<Acc>& terms) const {
        if (WHOLE || (aligned && valid == OCTET)) {
            to_numbers(load_octet(x + position, true), terms.v);
        } else {
            read_valid(x + position, valid, fours, terms.v);
        }
    }
};

template <class T, int Gate> struct ContiguousPair {
    using Acc = typename Format<T>::Acc;
    const T* x;
    const T* dy;
    bool aligned, fours; // both
    const unsigned char* bits;
    long long first_bit; // of the tile
    Coefficients<Acc> c;

    __device__ __forceinline__ bool is_aligned() const { return aligned; }

    template <bool WHOLE> __device__ __forceinline__ void read(int position, int valid, SumTerms<Acc>& terms) const {
        const int count = WHOLE || valid > OCTET ? OCTET : valid;
        const unsigned passed = Gate == GATE_BITS && count > 0 ? load_bits(bits, first_bit + position, count) : 0;
        Acc xs[OCTET], dys[OCTET];
        if (WHOLE || (aligned && valid == OCTET)) {
            to_numbers(load_octet(x + position, true), xs);
            to_numbers(load_octet(dy + position, true), dys);
        } else {
            read_valid(x + position, valid, fours, xs);
            read_valid(dy + position, valid, fours, dys);
        }
#pragma unroll
        for (int j = 0; j < OCTET; ++j) {
            terms.v[j] = terms_of<T, Gate>(xs[j], dys[j], passed >> j & 1, c);
            if (!WHOLE && j >= valid) terms.v[j] = {Acc(0), Acc(0)};
        }
    }
};

template <class T> __device__ __forceinline__ const T* tile_at(const Operand& o, long long n, long long c, long long t) {
    return reinterpret_cast<const T*>(o.pointer) + n * o.sample + c * o.channel + t * TILE;
}

// The reader of tile t of sample n and channel c.
template <class T, int Gate>
__device__ __forceinline__ Contiguous<T> reader_at(Moments, const Parameters& p, long long n, long long c, long long t) {
    const T* x = tile_at<T>(p.x, n, c, t);
    return {x, p.x.vectors && p.positions % OCTET == 0, has_fours(x, p.positions)};
}

template <class T, int Gate>
__device__ __forceinline__ ContiguousPair<T, Gate> reader_at(
    Sums, const Parameters& p, long long n, long long c, long long t
) {
    using Acc = typename Format<T>::Acc;
    const T *x = tile_at<T>(p.x, n, c, t), *dy = tile_at<T>(p.g, n, c, t);
    return {x,
            dy,
            p.x.vectors && p.g.vectors && p.positions % OCTET == 0,
            has_fours(x, p.positions) && has_fours(dy, p.positions),
            reinterpret_cast<const unsigned char*>(p.bits),
            p.bits_first + n * p.bits_sample + c * p.bits_channel + t * TILE,
            load_coefficients<Acc>(p, c)};
}
