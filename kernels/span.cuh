// Rows of nodes: the tiles of a block, merged in double up the tree (tiles of a sample, then samples) in shared memory.
#pragma once
#include "parameters.cuh"
#include "tree.cuh"

// The padded tiles of a block and the channels it works on.
struct Span {
    int tiles, group;
    long long first_channel, row, base; // base: the first tile
};

__device__ __forceinline__ Span span_of(const Parameters& p, long long block) {
    Span s;
    s.tiles = static_cast<int>(p.span);
    s.group = static_cast<int>(p.group);
    s.first_channel = block % p.blocks_across * s.group;
    s.row = block / p.blocks_across;
    s.base = s.row * p.span;
    return s;
}

// One tile of one channel; length 0 if there is none.
struct Item {
    int place; // among the nodes of the block
    long long sample, channel, tile;
    int length;
};

// Item k of a block: neighbouring items are neighbouring channels.
__device__ __forceinline__ Item item_of(const Parameters& p, const Span& s, int k) {
    Item item;
    const int i = k / s.group, g = k % s.group;
    item.place = g * s.tiles + i;
    item.sample = (s.base + i) >> p.log2_tiles;
    item.tile = (s.base + i) & ((1LL << p.log2_tiles) - 1);
    item.channel = s.first_channel + g;
    const bool there = i < s.tiles && item.sample < p.samples && item.tile < p.tiles &&
                       item.channel < p.channels;
    const long long rest = p.positions - item.tile * TILE;
    item.length = !there ? 0 : rest < TILE ? static_cast<int>(rest) : TILE;
    return item;
}

// nodes[g * tiles + i] is tile i of channel g, or `apart` tiles from i * apart on; each channel's root ends in its
// first. All values are present.
template <class Kind>
__device__ void merge_span(const Parameters& p, const Span& s, Node<double>* nodes, long long apart = 1) {
    for (int size = 1; size < s.tiles; size *= 2) {
        const int pairs = s.tiles / (2 * size);
        const double half = multiply(from_integer(size * apart * p.positions), 0.5);
        __syncthreads();
        for (int j = threadIdx.x; j < s.group * pairs; j += blockDim.x) {
            const int left = 2 * size * (j % pairs), right = left + size;
            Node<double>* n = nodes + j / pairs * s.tiles;
            if (p.log2_tiles == 0 && s.base + (right + size) * apart <= p.samples) { // whole samples, all of them there
                n[left] = Kind::merge(n[left], n[right], 0.5, half);
                continue;
            }
            const auto values = [&](int i) { return values_before(p, s.base + i * apart); };
            const long long before = values(left), middle = values(right), after = values(right + size);
            n[left] = merge_counted<Kind>(n[left], middle - before, n[right], after - middle);
        }
    }
    __syncthreads();
}

// The same of counted nodes: values[i] of tile i, of every channel; nodes of no values are never looked at.
template <class Kind>
__device__ void merge_counted_span(Node<double>* nodes, long long* values, int tiles, int group) {
    for (int size = 1; size < tiles; size *= 2) {
        const int pairs = (tiles + size - 1) / (2 * size);
        __syncthreads();
        for (int j = threadIdx.x; j < group * pairs; j += blockDim.x) {
            const int left = 2 * size * (j % pairs), right = left + size;
            Node<double>* of_channel = nodes + j / pairs * tiles;
            of_channel[left] =
                merge_counted<Kind>(of_channel[left], values[left], of_channel[right], values[right]);
        }
        __syncthreads();
        for (int j = threadIdx.x; j < pairs; j += blockDim.x) values[2 * size * j] += values[2 * size * j + size];
    }
    __syncthreads();
}

// Write the roots of a block's channels, `apart` nodes from one another, into their row.
__device__ __forceinline__ void store_nodes(const Parameters& p, const Span& s, const Node<double>* nodes, int apart) {
    for (int g = threadIdx.x; g < s.group; g += blockDim.x) {
        const long long c = s.first_channel + g, at = s.row * p.channels + c;
        if (c >= p.channels) break;
        reinterpret_cast<double*>(p.node_first)[at] = nodes[g * apart].first;
        reinterpret_cast<double*>(p.node_second)[at] = nodes[g * apart].second;
    }
}

// The same, and how many values each stands for.
__device__ __forceinline__ void store_row(
    const Parameters& p, const Span& s, const Node<double>* nodes, int apart, long long values
) {
    store_nodes(p, s, nodes, apart);
    if (s.first_channel == 0 && threadIdx.x == 0) reinterpret_cast<long long*>(p.node_count)[s.row] = values;
}
