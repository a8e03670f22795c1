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

// Positions one after the other, in global or shared memory.
template <class T> struct Contiguous {
    using Acc = typename Format<T>::Acc;
    const T* x;
    bool vectors;

    __device__ __forceinline__ bool is_aligned() const { return vectors; }

    template <bool WHOLE> __device__ __forceinline__ void read(int position, int valid, MomentTerms<Acc>& terms) const {
        if (WHOLE || (vectors && valid >= OCTET)) {
            to_numbers(load_octet(x + position, true), terms.v);
        } else {
#pragma unroll
            for (int j = 0; j < OCTET; ++j) terms.v[j] = j < valid ? Format<T>::widen(x[position + j]) : Acc(0);
        }
    }
};

template <class T, int Gate> struct ContiguousPair {
    using Acc = typename Format<T>::Acc;
    const T* x;
    const T* dy;
    bool x_vectors, dy_vectors;
    const unsigned char* bits;
    long long first_bit; // of the tile
    Coefficients<Acc> c;

    __device__ __forceinline__ bool is_aligned() const { return x_vectors && dy_vectors; }

    template <bool WHOLE> __device__ __forceinline__ void read(int position, int valid, SumTerms<Acc>& terms) const {
        if (!WHOLE && valid <= 0) {
#pragma unroll
            for (int j = 0; j < OCTET; ++j) terms.v[j] = {Acc(0), Acc(0)};
            return;
        }
        const int count = WHOLE || valid > OCTET ? OCTET : valid;
        const unsigned passed = Gate == GATE_BITS ? load_bits(bits, first_bit + position, count) : 0;
        if (WHOLE || (is_aligned() && valid >= OCTET)) {
            Acc xs[OCTET], dys[OCTET];
            to_numbers(load_octet(x + position, true), xs);
            to_numbers(load_octet(dy + position, true), dys);
#pragma unroll
            for (int j = 0; j < OCTET; ++j) terms.v[j] = terms_of<T, Gate>(xs[j], dys[j], passed >> j & 1, c);
        } else {
#pragma unroll
            for (int j = 0; j < OCTET; ++j) {
                terms.v[j] = {Acc(0), Acc(0)};
                if (j < valid)
                    terms.v[j] = terms_of<T, Gate>(Format<T>::widen(x[position + j]), Format<T>::widen(dy[position + j]),
                                                   passed >> j & 1, c);
            }
        }
    }
};

template <class T> __device__ __forceinline__ const T* tile_at(const Operand& o, long long n, long long c, long long t) {
    return reinterpret_cast<const T*>(o.pointer) + n * o.sample + c * o.channel + t * TILE;
}

// The reader of tile t of sample n and channel c.
template <class T, int Gate>
__device__ __forceinline__ Contiguous<T> reader_at(Moments, const Parameters& p, long long n, long long c, long long t) {
    return {tile_at<T>(p.x, n, c, t), p.x.vectors != 0};
}

template <class T, int Gate>
__device__ __forceinline__ ContiguousPair<T, Gate> reader_at(
    Sums, const Parameters& p, long long n, long long c, long long t
) {
    using Acc = typename Format<T>::Acc;
    return {tile_at<T>(p.x, n, c, t),
            tile_at<T>(p.g, n, c, t),
            p.x.vectors != 0,
            p.g.vectors != 0,
            reinterpret_cast<const unsigned char*>(p.bits),
            p.bits_first + n * p.bits_sample + c * p.bits_channel + t * TILE,
            load_coefficients<Acc>(p, c)};
}
