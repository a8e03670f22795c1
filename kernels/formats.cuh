// Element formats: how float16, bfloat16, float32 and float64 lie in memory, and the arithmetic they are widened to.
#pragma once
#include "arithmetic.cuh"

struct alignas(2) float16 {
    unsigned short bits;
};
struct alignas(2) bfloat16 {
    unsigned short bits;
};

template <class T> struct Format;

template <> struct Format<float16> {
    using Acc = float;
    static EXACT float widen(float16 v) { return from_half(v.bits); }
    static EXACT float16 round(float v) { return {to_half(v)}; }
};
template <> struct Format<bfloat16> {
    using Acc = float;
    static EXACT float widen(bfloat16 v) { return float_of(static_cast<unsigned>(v.bits) << 16); }
    static EXACT bfloat16 round(float v) { // to nearest even, by hand: compute capability 7.5 has no such conversion
        const unsigned u = bits_of(v);
        const unsigned rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
        const unsigned nan = 0x7fff;
        return {static_cast<unsigned short>((u & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
    }
};
template <> struct Format<float> {
    using Acc = float;
    static EXACT float widen(float v) { return v; }
    static EXACT float round(float v) { return v; }
};
template <> struct Format<double> {
    using Acc = double;
    static EXACT double widen(double v) { return v; }
    static EXACT double round(double v) { return v; }
};

// Eight neighbouring elements: what a thread loads, computes and stores at a time.
constexpr int OCTET = 8;

template <class T> union Octet {
    uint4 words[sizeof(T) * OCTET / sizeof(uint4)];
    T v[OCTET];
};

// `vectors` says that every octet of the array begins at a multiple of 16 bytes.
template <class T> __device__ __forceinline__ Octet<T> load_octet(const T* p, bool vectors) {
    constexpr int WORDS = sizeof(Octet<T>) / sizeof(uint4);
    Octet<T> r;
    if (vectors) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) r.words[i] = reinterpret_cast<const uint4*>(p)[i];
    } else {
#pragma unroll
        for (int j = 0; j < OCTET; ++j) r.v[j] = p[j];
    }
    return r;
}

// A store of 16 bytes, written out: the compiler takes a plain one apart where another branch stores the same elements.
__device__ __forceinline__ void store_vector(uint4* p, uint4 v) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w) : "memory");
#else
    *p = v;
#endif
}

template <class T> __device__ __forceinline__ void store_octet(T* p, const Octet<T>& r, bool vectors) {
    constexpr int WORDS = sizeof(Octet<T>) / sizeof(uint4);
    if (vectors) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) store_vector(reinterpret_cast<uint4*>(p) + i, r.words[i]);
    } else {
#pragma unroll
        for (int j = 0; j < OCTET; ++j) p[j] = r.v[j];
    }
}
