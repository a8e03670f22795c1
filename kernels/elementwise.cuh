// What happens to eight elements once their values and coefficients are at hand: normalise, the input gradient, or a
// combination, of which a double backward has two.
//
// -DOPERATION=<NORMALIZE|GRADIENT|COMBINE>; NORMALIZE: -DRESIDUAL -DRELU -DKEEP_BITS; GRADIENT: -DGATE -DFROZEN
// -DRESIDUAL (whether there is a dresidual); each 0 or 1. COMBINE: -DGATE -DTHIRD=<NONE|ADDED|WEIGHTED>.
#pragma once
#include "readers.cuh"

#define NORMALIZE 0
#define GRADIENT 1
#define COMBINE 2
#define NONE 0
#define ADDED 1
#define WEIGHTED 2
#if OPERATION == NORMALIZE
#define GATE GATE_NONE
#else
#define RELU 0
#define KEEP_BITS 0
#endif
#if OPERATION != GRADIENT
#define FROZEN 0
#endif
#if OPERATION == COMBINE
#define RESIDUAL 0
#else
#define THIRD NONE
#endif

// What elements need besides their coefficients.
constexpr bool READS_X = !FROZEN || GATE == GATE_RECOMPUTE;
constexpr bool READS_G = OPERATION != NORMALIZE || RESIDUAL;
constexpr bool READS_R = THIRD != NONE;
constexpr bool READS_BITS = OPERATION != NORMALIZE && GATE == GATE_BITS;
constexpr bool WRITES_R = OPERATION == GRADIENT && RESIDUAL;
constexpr bool WRITES_BITS = OPERATION == NORMALIZE && KEEP_BITS;

// Numbers in the arithmetic: what is written is yet to be rounded.
template <class Acc> struct Element {
    Acc x, g, y, r;
    bool passed; // a ReLU; written by normalise, read by the others
};

template <class T, class Acc> __device__ __forceinline__ void compute(Element<Acc>& e, const Coefficients<Acc>& c) {
#if OPERATION == NORMALIZE
    e.y = normalized(e.x, c);
    if (RESIDUAL) e.y = add(e.y, e.g);
    if (RELU) e.y = relu(e.y);
    if (KEEP_BITS) e.passed = !at_most(e.y, Format<T>::rounds_to_zero());
#elif OPERATION == GRADIENT
    e.r = gate<T, GATE>(e.x, e.g, e.passed, c);
    e.y = FROZEN ? multiply(e.r, c.scale) : input_gradient(e.r, e.x, c);
#else
    e.y = combined(e.g, e.x, c);
    if (THIRD != NONE) e.y = add(e.y, THIRD == WEIGHTED ? multiply(e.r, c.beta) : e.r);
    e.y = gate<T, GATE>(e.x, e.y, e.passed, c);
#endif
}

// Eight neighbouring elements of every operand.
template <class T> struct Octets {
    using Acc = typename Format<T>::Acc;
    Acc x[OCTET], g[OCTET], y[OCTET], r[OCTET];
    unsigned passed;

    __device__ __forceinline__ Element<Acc> at(int j) const {
        return {READS_X ? x[j] : Acc(0), READS_G ? g[j] : Acc(0), {}, READS_R ? r[j] : Acc(0), bool(passed >> j & 1)};
    }
    __device__ __forceinline__ void put(int j, const Element<Acc>& e) {
        y[j] = e.y;
        if (WRITES_R) r[j] = e.r;
        if (WRITES_BITS) passed = (passed & ~(1u << j)) | static_cast<unsigned>(e.passed) << j;
    }
};

template <class T> __device__ __forceinline__ T* place(const Operand& o, long long offset) {
    return reinterpret_cast<T*>(o.pointer) + offset;
}

// How far into each operand an element is.
struct Offsets {
    long long x, g, y, r;
};

// DENSE says that octets of all operands begin at multiples of 16 bytes; else each operand says so of its own.
template <bool DENSE, class T>
__device__ __forceinline__ void load_octets(const Parameters& p, const Offsets& at, long long octet, Octets<T>& v) {
    if (READS_X) to_numbers(load_octet(place<const T>(p.x, at.x), DENSE || p.x.vectors != 0), v.x);
    if (READS_G) to_numbers(load_octet(place<const T>(p.g, at.g), DENSE || p.g.vectors != 0), v.g);
    if (READS_R) to_numbers(load_octet(place<const T>(p.r, at.r), DENSE || p.r.vectors != 0), v.r);
    v.passed = READS_BITS ? reinterpret_cast<const unsigned char*>(p.bits)[octet] : 0;
}

template <bool DENSE, class T>
__device__ __forceinline__ void store_octets(const Parameters& p, const Offsets& at, long long octet, const Octets<T>& v) {
    store_octet(place<T>(p.y, at.y), rounded<T>(v.y), DENSE || p.y.vectors != 0);
    if (WRITES_R) store_octet(place<T>(p.r, at.r), rounded<T>(v.r), DENSE || p.r.vectors != 0);
    if (WRITES_BITS) reinterpret_cast<unsigned char*>(p.bits)[octet] = static_cast<unsigned char>(v.passed);
}

template <class T, class Acc = typename Format<T>::Acc>
__device__ __forceinline__ Element<Acc> load_element(const Parameters& p, const Offsets& at, bool passed) {
    Element<Acc> e{};
    if (READS_X) e.x = Format<T>::widen(*place<const T>(p.x, at.x));
    if (READS_G) e.g = Format<T>::widen(*place<const T>(p.g, at.g));
    if (READS_R) e.r = Format<T>::widen(*place<const T>(p.r, at.r));
    e.passed = passed;
    return e;
}

template <class T, class Acc>
__device__ __forceinline__ void store_element(const Parameters& p, const Offsets& at, const Element<Acc>& e) {
    *place<T>(p.y, at.y) = Format<T>::round(e.y);
    if (WRITES_R) *place<T>(p.r, at.r) = Format<T>::round(e.r);
}
