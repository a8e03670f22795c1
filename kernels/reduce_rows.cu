// Nodes of rows of the tree from arrays whose positions lie one after the other: `span` tiles of `group` channels a
// block, TILE_LANES lanes a tile.
//
// -DELEMENT=<type> -DKIND=<Moments|Sums> -DGATE=<gate> -DTILE_LANES=<1..32> -DTILE_ROWS=<0..8> -DTALL=<0|1>
#include "rows.cuh"

// Blocks of a multiprocessor, or more, that registers are left for: fewer where a tile's rows are kept in them, or on
// their way, or pairs of numbers are taken apart.
constexpr int OF_A_ROW = KIND::NEEDS_COEFFICIENTS && sizeof(ELEMENT) == 2 ? 3 : 4;
constexpr int BLOCKS = (TILE_ROWS == 1 && !TALL ? OF_A_ROW : 2) / (sizeof(ELEMENT) == 8 ? 2 : 1);

extern "C" __global__ void __launch_bounds__(256, BLOCKS) reduce_rows(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Node<double>* nodes = reinterpret_cast<Node<double>*>(memory);
    const Span s = span_of(p, blockIdx.x);
    reduce_span(p, s, nodes);
    store_row(p, s, nodes, s.tiles, values_between(p, s.base, s.base + s.tiles));
}
