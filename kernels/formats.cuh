// Element formats: how float16, bfloat16, float32 and float64 lie in memory, and the arithmetic they are widened to.
//
// `rounds_to_zero` is the largest number that does: whatever is at most that is not positive once it is rounded.
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
    static EXACT unsigned round_pair(float low, float high) { return to_half_pair(low, high); }
    static EXACT float rounds_to_zero() { return 0x1p-25f; }
};
template <> struct Format<bfloat16> {
    using Acc = float;
    static EXACT float widen(bfloat16 v) { return float_of(static_cast<unsigned>(v.bits) << 16); }
    static EXACT bfloat16 round(float v) { return {to_bfloat(v)}; }
    static EXACT unsigned round_pair(float low, float high) { return to_bfloat_pair(low, high); }
    static EXACT float rounds_to_zero() { return 0x1p-134f; }
};
template <> struct Format<float> {
    using Acc = float;
    static EXACT float widen(float v) { return v; }
    static EXACT float round(float v) { return v; }
    static EXACT float rounds_to_zero() { return 0; }
};
template <> struct Format<double> {
    using Acc = double;
    static EXACT double widen(double v) { return v; }
    static EXACT double round(double v) { return v; }
    static EXACT double rounds_to_zero() { return 0; }
};

// Eight neighbouring elements: what a thread loads, computes and stores at a time.
constexpr int OCTET = 8;

template <class T> union Octet {
    uint4 words[sizeof(T) * OCTET / sizeof(uint4)];
    unsigned pairs[sizeof(T) * OCTET / sizeof(unsigned)]; // of 16-bit elements
    uint2 fours[sizeof(T) * OCTET / sizeof(uint2)];       // likewise
    T v[OCTET];
};

// The numbers of an octet.
template <class T> EXACT void to_numbers(const Octet<T>& octet, typename Format<T>::Acc (&v)[OCTET]) {
#pragma unroll
    for (int j = 0; j < OCTET; ++j) v[j] = Format<T>::widen(octet.v[j]);
}
EXACT void to_numbers(const Octet<bfloat16>& octet, float (&v)[OCTET]) { // an instruction each
#pragma unroll
    for (int j = 0; j < OCTET; j += 2) {
        v[j] = float_of(octet.pairs[j / 2] << 16);
        v[j + 1] = float_of(octet.pairs[j / 2] & 0xffff0000);
    }
}

// The octet of eight numbers, each rounded once.
template <class T> EXACT Octet<T> rounded(const typename Format<T>::Acc (&v)[OCTET]) {
    Octet<T> octet;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int j = 0; j < OCTET; j += 2) octet.pairs[j / 2] = Format<T>::round_pair(v[j], v[j + 1]);
    } else {
#pragma unroll
        for (int j = 0; j < OCTET; ++j) octet.v[j] = Format<T>::round(v[j]);
    }
    return octet;
}

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
