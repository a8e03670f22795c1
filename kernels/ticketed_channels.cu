// A whole training step, or its whole gradient, of arrays whose channels lie one after the other, a multiple of 8 of
// them: slices of channels that fit the second-level cache are read from memory once, reduced, and read from the cache to
// be made into y or dx. See tickets.cuh for who does what when.
//
// A piece is `span` padded tiles of 2^DEPTH * VECTOR neighbouring channels; positions go on with one step from one sample
// to the next. y may be x, and dx may be dy: no piece of a slice is written before all are reduced.
//
// Shared memory: nodes of a pass; of a span, or of all rows of some channels. Bytes moved: as by ticketed.cu.
// -DELEMENT=<type> -DTHREADS=256 -DCLUSTER=1 -DTILE_ROWS=<1..8> -DVECTOR=<channels of a thread>
// -DDEPTH=<log2 of a thread's columns> -DTILE_DEPTH=<log2 of a tile's columns, padded to a power of two>, and what
// elementwise.cuh asks for. Planned by `plan.ticketed`.
#include "tickets.cuh"
#include "passes.cuh"
#include "positions.cuh"

constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 1 : 2; // of a multiprocessor: as many as the planner launches
constexpr bool SCARCE = TILE_DEPTH == 0 || (TILE_ROWS > 1 && DEPTH > 3); // registers, in the reduction
constexpr int BATCH = READS_G || SCARCE ? 1 : 2;                      // octets under way
constexpr int OCTETS = WIDTH / OCTET;

// y, or dx and dresidual, of a piece.
template <bool DENSE> __device__ __forceinline__ void apply_span(const Parameters& p, const Span& s) {
    const long long c = s.first_channel + threadIdx.x % OCTETS * OCTET;
    const long long first = values_before(p, s.base) + threadIdx.x / OCTETS, end = values_before(p, s.base + s.tiles);
    apply_positions<DENSE, BATCH>(p, c, first, end, THREADS / OCTETS);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ticketed_channels(const __grid_constant__ Parameters p) {
    __shared__ Node<double> shares[SHARES];
    extern __shared__ __align__(16) unsigned char memory[];
    take_turns<Acc>(
        p, reinterpret_cast<Node<double>*>(memory),
        [&](const Span& s, Node<double>* nodes) { return reduce_span(p, s, shares, nodes); },
        [&](const Span& s) {
            if (p.dense) apply_span<true>(p, s);
            else apply_span<false>(p, s);
        }
    );
}
