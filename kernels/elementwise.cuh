// What happens to eight elements once their values and coefficients are at hand: normalise, or the input gradient.
//
// -DOPERATION=<NORMALIZE|GRADIENT>; NORMALIZE: -DRESIDUAL -DRELU -DKEEP_BITS; GRADIENT: -DGATE -DFROZEN -DRESIDUAL
// (whether there is a dresidual); each 0 or 1.
#pragma once
#include "readers.cuh"

#define NORMALIZE 0
#define GRADIENT 1
#if OPERATION == NORMALIZE
#define GATE GATE_NONE
#define FROZEN 0
#else
#define RELU 0
#define KEEP_BITS 0
#endif

// What elements need besides their coefficients.
constexpr bool READS_X = OPERATION == NORMALIZE || !FROZEN || GATE == GATE_RECOMPUTE;
constexpr bool READS_G = OPERATION == GRADIENT || RESIDUAL;
constexpr bool READS_BITS = OPERATION == GRADIENT && GATE == GATE_BITS;
constexpr bool WRITES_R = OPERATION == GRADIENT && RESIDUAL;
constexpr bool WRITES_BITS = OPERATION == NORMALIZE && KEEP_BITS;

template <class T> struct Element {
    T x, g, y, r;
    bool passed; // a ReLU; read by the gradient, written by normalise
};

template <class T> __device__ __forceinline__ void compute(Element<T>& e, const Coefficients<typename Format<T>::Acc>& c) {
    using Acc = typename Format<T>::Acc;
#if OPERATION == NORMALIZE
    Acc v = normalized(Format<T>::widen(e.x), c);
    if (RESIDUAL) v = add(v, Format<T>::widen(e.g));
    if (RELU) v = relu(v);
    e.y = Format<T>::round(v);
    if (KEEP_BITS) e.passed = !not_positive(Format<T>::widen(e.y));
#else
    const Acc x = READS_X ? Format<T>::widen(e.x) : Acc(0);
    const bool stopped = GATE == GATE_RECOMPUTE ? was_stopped<T>(x, c) : GATE == GATE_BITS && !e.passed;
    const Acc dy = stopped ? Acc(0) : Format<T>::widen(e.g);
    e.y = Format<T>::round(FROZEN ? multiply(dy, c.scale) : input_gradient(dy, x, c));
    if (RESIDUAL) e.r = Format<T>::round(dy);
#endif
}

// Eight neighbouring elements of every operand.
template <class T> struct Octets {
    Octet<T> x, g, y, r;
    unsigned passed;

    __device__ __forceinline__ Element<T> at(int j) const { return {x.v[j], g.v[j], {}, {}, bool(passed >> j & 1)}; }
    __device__ __forceinline__ void put(int j, const Element<T>& e) {
        y.v[j] = e.y;
        if (WRITES_R) r.v[j] = e.r;
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

template <class T>
__device__ __forceinline__ void load_octets(const Parameters& p, const Offsets& at, long long octet, Octets<T>& v) {
    if (READS_X) v.x = load_octet(place<const T>(p.x, at.x), p.x.vectors != 0);
    if (READS_G) v.g = load_octet(place<const T>(p.g, at.g), p.g.vectors != 0);
    v.passed = READS_BITS ? reinterpret_cast<const unsigned char*>(p.bits)[octet] : 0;
}

template <class T>
__device__ __forceinline__ void store_octets(const Parameters& p, const Offsets& at, long long octet, const Octets<T>& v) {
    store_octet(place<T>(p.y, at.y), v.y, p.y.vectors != 0);
    if (WRITES_R) store_octet(place<T>(p.r, at.r), v.r, p.r.vectors != 0);
    if (WRITES_BITS) reinterpret_cast<unsigned char*>(p.bits)[octet] = static_cast<unsigned char>(v.passed);
}

template <class T>
__device__ __forceinline__ Element<T> load_element(const Parameters& p, const Offsets& at, bool passed) {
    Element<T> e{};
    if (READS_X) e.x = *place<const T>(p.x, at.x);
    if (READS_G) e.g = *place<const T>(p.g, at.g);
    e.passed = passed;
    return e;
}

template <class T> __device__ __forceinline__ void store_element(const Parameters& p, const Offsets& at, const Element<T>& e) {
    *place<T>(p.y, at.y) = e.y;
    if (WRITES_R) *place<T>(p.r, at.r) = e.r;
}
