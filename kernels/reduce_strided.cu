// Nodes of rows of the tree from arrays of any strides, with or without a mask: `span` tiles of `group` channels a
// block, TILE_LANES lanes a tile.
//
// -DELEMENT=<type> -DKIND=<Moments|Sums> -DGATE=<gate> -DTILE_LANES=<1..32>
#include "span.cuh"
#include "strided.cuh"

constexpr int BLOCKS = 2; // of a multiprocessor, or more: registers are for these

extern "C" __global__ void __launch_bounds__(256, BLOCKS) reduce_strided(const __grid_constant__ Parameters p) {
    using Acc = Format<ELEMENT>::Acc;
    extern __shared__ __align__(16) unsigned char memory[];
    const Span s = span_of(p, blockIdx.x);
    Node<double>* nodes = reinterpret_cast<Node<double>*>(memory);
    long long* values = reinterpret_cast<long long*>(nodes + s.tiles * s.group);
    const int at_once = blockDim.x / TILE_LANES;
    for (int first = 0; first < s.tiles * s.group; first += at_once) {
        const Item item = item_of(p, s, first + threadIdx.x / TILE_LANES);
        Scattered<ELEMENT, GATE> reader{p, item.sample, item.channel, item.tile * TILE, {}};
        if (KIND::NEEDS_COEFFICIENTS && item.length) reader.c = load_coefficients<Acc>(p, item.channel);
        const Counted<double> tile = reduce_scattered<TILE_LANES, Acc>(KIND{}, reader, item.length);
        if (first + threadIdx.x / TILE_LANES >= s.tiles * s.group || threadIdx.x % TILE_LANES) continue;
        nodes[item.place] = tile.node;
        if (item.channel == s.first_channel) values[item.place] = tile.values;
    }
    __syncthreads();
    merge_counted_span<KIND>(nodes, values, s.tiles, s.group);
    store_row(p, s, nodes, s.tiles, values[0]);
}
