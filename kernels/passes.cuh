// Nodes of a span where channels lie one after the other: passes of a block over 256 columns, of one tile or of several
// short ones.
//
// Constants and macros as columns.cuh asks for.
#pragma once
#include "columns.cuh"
#include "span.cuh"

constexpr int PASS_DEPTH = 8;
constexpr int WORKERS = 1 << (PASS_DEPTH - DEPTH); // threads that share a channel
constexpr int LANES = 256 / WORKERS;               // threads side by side over the channels
constexpr int WIDTH = LANES * VECTOR;              // channels of a block
constexpr int SHARES = WORKERS * WIDTH;            // nodes of a pass

// Values in global memory.
struct Global {
    const Parameters& p;
    long long first_channel, channel; // of the block, of the thread

    struct Rows {
        const ELEMENT* first;
        long long step;
        __device__ __forceinline__ Vectors operator[](int i) const {
            return *reinterpret_cast<const Vectors*>(first + i * step);
        }
    };

    static __device__ __forceinline__ const ELEMENT* at(const Operand& o, long long sample, long long position) {
        return reinterpret_cast<const ELEMENT*>(o.pointer) + sample * o.sample + position * o.position;
    }
    __device__ __forceinline__ Rows x(long long sample, long long position) const {
        return {at(p.x, sample, position) + channel, p.x.position};
    }
    __device__ __forceinline__ Rows dy(long long sample, long long position) const {
        return {at(p.g, sample, position) + channel, p.g.position};
    }
    __device__ __forceinline__ Vectors pivot(const Rows& rows, long long, long long) const { return rows[0]; }
    __device__ __forceinline__ ELEMENT value(long long sample, long long position, int g) const {
        return at(p.x, sample, position)[first_channel + g];
    }
};

// The roots of the span's channels in `passes`; how many nodes these lie from one another.
__device__ __forceinline__ int reduce_span(
    const Parameters& p, const Span& s, Node<double>* shares, Node<double>* passes
) {
    const int lane = threadIdx.x % LANES, worker = threadIdx.x / LANES;
    constexpr int PASS_TILES = 1 << (PASS_DEPTH - TILE_DEPTH);
    const int rounds = s.tiles > PASS_TILES ? s.tiles / PASS_TILES : 1;
    const long long channel = s.first_channel + lane * VECTOR;
    Worker<Global> w(p, {p, s.first_channel, channel}, channel, s.base + s.tiles);
    if (KIND::NEEDS_COEFFICIENTS && channel < p.channels)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) w.c[KIND::NEEDS_COEFFICIENTS ? i : 0] = load_coefficients<Acc>(p, channel + i);
    for (int round = 0; round < rounds; ++round) {
        const long long tile = s.base + round * PASS_TILES;
        const int column = worker << DEPTH;
        decltype(Share<>::reduce(w, tile, column)) share{};
        if (channel < p.channels)
            share = Share<>::reduce(w, tile + (column >> TILE_DEPTH), column & ((1 << TILE_DEPTH) - 1));
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            shares[worker * WIDTH + lane * VECTOR + i] = {to_double(share.v[i].first), to_double(share.v[i].second)};
#pragma unroll 1
        for (int level = DEPTH; level < PASS_DEPTH; ++level) {
            const int size = 1 << (level - DEPTH);
            __syncthreads();
            for (int k = threadIdx.x; k < WIDTH * (WORKERS / 2 / size); k += blockDim.x) {
                const int g = k % WIDTH, left = k / WIDTH * 2 * size, at = left << DEPTH;
                if (s.first_channel + g >= p.channels) continue;
                Node<double>& node = shares[left * WIDTH + g];
                node = w.merge_shares(node, shares[(left + size) * WIDTH + g], level, tile + (at >> TILE_DEPTH),
                                      at & ((1 << TILE_DEPTH) - 1), g);
            }
        }
        __syncthreads();
        for (int g = threadIdx.x; g < WIDTH; g += blockDim.x) passes[g * rounds + round] = shares[g];
        __syncthreads();
    }
    for (int size = 1; size < rounds; size *= 2) {
        __syncthreads();
        for (int k = threadIdx.x; k < WIDTH * (rounds / 2 / size); k += blockDim.x) {
            const int left = k / WIDTH * 2 * size;
            Node<double>* of_channel = passes + k % WIDTH * rounds;
            of_channel[left] = w.merge_tiles(of_channel[left], of_channel[left + size],
                                             s.base + static_cast<long long>(left) * PASS_TILES,
                                             static_cast<long long>(size) * PASS_TILES);
        }
    }
    __syncthreads();
    return rounds;
}
