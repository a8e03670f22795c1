// Nodes of rows of the tree from arrays whose channels lie one after the other: a thread owns VECTOR channels of 2^DEPTH
// neighbouring columns, a pass of a block 256 columns (of one tile, or of several short ones), a block `span` tiles.
//
// -DELEMENT=<type> -DKIND=<Moments|Sums> -DGATE=<gate> -DTILE_ROWS=<1..8> -DVECTOR=<channels of a thread>
// -DDEPTH=<log2 of a thread's columns> -DTILE_DEPTH=<log2 of a tile's columns, padded to a power of two>
// -DBLOCKS=<of a multiprocessor, or more, that registers are left for: a thread holds a node in double of each channel for
// each level above its tiles>
#include "passes.cuh"

extern "C" __global__ void __launch_bounds__(256, BLOCKS) reduce_channels(const __grid_constant__ Parameters p) {
    __shared__ Node<double> shares[SHARES];
    extern __shared__ __align__(16) unsigned char memory[];
    Node<double>* nodes = reinterpret_cast<Node<double>*>(memory);
    const Span s = span_of(p, blockIdx.x);
    const int apart = reduce_span(p, s, shares, nodes);
    store_row(p, s, nodes, apart, values_between(p, s.base, s.base + s.tiles));
}
