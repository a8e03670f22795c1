// Arrays of any strides, with or without a mask: every element's address is worked out by itself.
#pragma once
#include "readers.cuh"

__device__ __forceinline__ long long position_offset(const Operand& o, long long position) {
    if (o.axes == 1) return position * o.stride[0];
    long long offset = 0;
    for (int axis = static_cast<int>(o.axes) - 1; axis > 0; --axis) {
        offset += position % o.extent[axis] * o.stride[axis];
        position /= o.extent[axis];
    }
    return o.axes ? offset + position * o.stride[0] : 0;
}

template <class T>
__device__ __forceinline__ T* element_at(const Operand& o, long long n, long long c, long long position) {
    return reinterpret_cast<T*>(o.pointer) + n * o.sample + c * o.channel + position_offset(o, position);
}

__device__ __forceinline__ bool is_present(const Parameters& p, long long n, long long position) {
    return p.mask.pointer == 0 || *element_at<const unsigned char>(p.mask, n, 0, position) != 0;
}

__device__ __forceinline__ long long bit_at(const Parameters& p, long long n, long long c, long long position) {
    return p.bits_first + n * p.bits_sample + c * p.bits_channel + position * p.bits_position;
}

__device__ __forceinline__ bool load_bit(const Parameters& p, long long n, long long c, long long position) {
    const long long i = bit_at(p, n, c, position);
    return reinterpret_cast<const unsigned char*>(p.bits)[i >> 3] >> (i & 7) & 1;
}

// A tile anywhere.
template <class T, int Gate> struct Scattered {
    using Acc = typename Format<T>::Acc;
    const Parameters& p;
    long long n, channel, first; // first position of the tile
    Coefficients<Acc> c;

    __device__ __forceinline__ bool present(int position) const { return is_present(p, n, first + position); }

    __device__ __forceinline__ Acc x(int position) const {
        return Format<T>::widen(*element_at<const T>(p.x, n, channel, first + position));
    }

    // dy behind its gate, and its product with x - mean.
    __device__ __forceinline__ Node<Acc> terms(int position) const {
        const Acc dy = Format<T>::widen(*element_at<const T>(p.g, n, channel, first + position));
        return terms_of<T, Gate>(x(position), dy, Gate == GATE_BITS && load_bit(p, n, channel, first + position), c);
    }
};

template <class Acc> struct Counted {
    Node<Acc> node;
    int values;
};

template <class Kind, class Acc> __device__ __forceinline__ Counted<Acc> merge_counted(Counted<Acc> a, Counted<Acc> b) {
    return {merge_counted<Kind>(a.node, a.values, b.node, b.values), a.values + b.values};
}

// Merge the 8 columns of every lane, then the WIDTH lanes.
template <class Kind, int WIDTH, class Acc>
__device__ __forceinline__ Counted<Acc> merge_all(Counted<Acc> (&n)[OCTET]) {
#pragma unroll
    for (int size = 1; size < OCTET; size *= 2)
#pragma unroll
        for (int j = 0; j < OCTET; j += 2 * size) n[j] = merge_counted<Kind>(n[j], n[j + size]);
    Counted<Acc> result = n[0];
#pragma unroll
    for (int offset = 1; offset < WIDTH; offset *= 2) {
        const Counted<Acc> other{shuffle_node(result.node, offset), __shfl_xor_sync(ALL_LANES, result.values, offset)};
        const bool right = threadIdx.x & offset;
        result = merge_counted<Kind>(right ? other : result, right ? result : other);
    }
    return result;
}

// The node of a tile of `length` positions. The rows are gone through three times (for the pivot, the mean, m2) rather
// than kept: working out addresses dominates here, and unrolled over 64 of them the code would be enormous.
template <int WIDTH, class Acc, class Reader>
__device__ __forceinline__ Counted<double> reduce_scattered(Moments, const Reader& reader, int length) {
    const int column = OCTET * (threadIdx.x % WIDTH);
    int first = TILE; // present, in the order of positions
#pragma unroll 1
    for (int row = column; row < length; row += COLUMNS)
        for (int j = OCTET - 1; j >= 0; --j)
            if (row + j < length && row + j < first && reader.present(row + j)) first = row + j;
#pragma unroll
    for (int offset = 1; offset < WIDTH; offset *= 2) {
        const int other = __shfl_xor_sync(ALL_LANES, first, offset);
        first = other < first ? other : first;
    }
    const Acc pivot = first < TILE ? reader.x(first) : Acc(0);
    Counted<Acc> n[OCTET] = {};
#pragma unroll 1
    for (int row = column; row < length; row += COLUMNS)
#pragma unroll
        for (int j = 0; j < OCTET; ++j)
            if (row + j < length && reader.present(row + j)) {
                const Acc v = subtract(reader.x(row + j), pivot);
                n[j].node.first = n[j].values++ ? add(n[j].node.first, v) : v;
            }
#pragma unroll
    for (int j = 0; j < OCTET; ++j)
        if (n[j].values > 1) n[j].node.first = divide(n[j].node.first, Acc(n[j].values));
#pragma unroll 1
    for (int row = column; row < length; row += COLUMNS)
#pragma unroll
        for (int j = 0; j < OCTET; ++j)
            if (row + j < length && n[j].values > 1 && reader.present(row + j)) {
                const Acc d = subtract(subtract(reader.x(row + j), pivot), n[j].node.first);
                n[j].node.second = add(n[j].node.second, multiply(d, d));
            }
    const Counted<Acc> tile = merge_all<Moments, WIDTH>(n);
    return {{add(to_double(pivot), to_double(tile.node.first)), to_double(tile.node.second)}, tile.values};
}

template <int WIDTH, class Acc, class Reader>
__device__ __forceinline__ Counted<double> reduce_scattered(Sums, const Reader& reader, int length) {
    const int column = OCTET * (threadIdx.x % WIDTH);
    Counted<Acc> n[OCTET] = {};
#pragma unroll 1
    for (int row = column; row < length; row += COLUMNS)
#pragma unroll
        for (int j = 0; j < OCTET; ++j)
            if (row + j < length && reader.present(row + j))
                n[j] = merge_counted<Sums>(n[j], Counted<Acc>{reader.terms(row + j), 1});
    const Counted<Acc> tile = merge_all<Sums, WIDTH>(n);
    return {{to_double(tile.node.first), to_double(tile.node.second)}, tile.values};
}
