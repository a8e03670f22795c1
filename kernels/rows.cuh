// Nodes of a span where positions lie one after the other, TILE_LANES lanes a tile.
//
// ELEMENT, KIND, GATE, TILE_LANES (1 to 32), TILE_ROWS and TALL (as reduce_tile has them) are macros or constants.
#pragma once
#include "readers.cuh"
#include "span.cuh"

// The roots of the span's channels, `tiles` nodes from one another.
__device__ __forceinline__ void reduce_span(const Parameters& p, const Span& s, Node<double>* nodes) {
    const int at_once = blockDim.x / TILE_LANES;
    for (int first = 0; first < s.tiles * s.group; first += at_once) {
        const Item item = item_of(p, s, first + threadIdx.x / TILE_LANES);
        const bool there = item.length > 0;
        const auto reader = reader_at<ELEMENT, GATE>(
            KIND{}, p, there ? item.sample : 0, there ? item.channel : s.first_channel, there ? item.tile : 0
        );
        const Node<double> node =
            reduce_tile<KIND, TILE_LANES, TILE_ROWS, TALL, Format<ELEMENT>::Acc>(reader, item.length, p.last);
        if (there && threadIdx.x % TILE_LANES == 0) nodes[item.place] = node;
    }
    merge_span<KIND>(p, s, nodes);
}
