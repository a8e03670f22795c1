// A whole training step, or its whole gradient, of channels whose values fit on chip: read from memory once, reduced in
// shared memory, and made into y or dx from there.
//
// CLUSTER blocks share `group` neighbouring channels of arrays whose positions lie one after the other, each has `span`
// padded tiles of them. In a group of several, a sample has one tile and channels lie one after the other as well.
// A block has read all that it works on before it writes any of it: y may be x, and dx may be dy.
//
// Shared memory: `slot` bytes of x for each sample of the block, as many of dy, nodes, roots of the cluster's blocks,
// coefficients. -DELEMENT=<type> -DTHREADS=<256|512> -DCLUSTER=<1|2|4|8> -DGROUPED=<0|1> (more than one channel)
// -DTILE_LANES=<1..32> -DTILE_ROWS=<1|8>, and what elementwise.cuh asks for.
#include "cluster.cuh"
#include "elementwise.cuh"
#include "span.cuh"
#include "staging.cuh"

using Acc = Format<ELEMENT>::Acc;

#if OPERATION == NORMALIZE
using Kind = Moments;
constexpr int STAGED = 1; // operands in shared memory
#else
using Kind = Sums;
constexpr int STAGED = 2;
#endif

constexpr int WARPS = THREADS / 32;
constexpr int AHEAD = 4; // pieces of a warp whose copies are under way
constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 1 : 512 / THREADS; // of a multiprocessor, that registers must be left for

// What a block works on: of neighbouring samples the same `run` of elements, in pieces that a warp stages and reduces.
struct Slab {
    Span span;
    long long sample, position; // the first
    int samples, channels, run;
    int piece, pieces; // elements of one, and how many a sample has
};

__device__ __forceinline__ Slab slab_of(const Parameters& p, int rank) {
    Slab b;
    b.span = {static_cast<int>(p.span), static_cast<int>(p.group), blockIdx.x / CLUSTER * p.group, rank, rank * p.span};
    const long long channels = p.channels - b.span.first_channel, first_tile = b.span.base & ((1LL << p.log2_tiles) - 1);
    b.channels = static_cast<int>(channels < p.group ? channels : p.group);
    b.sample = b.span.base >> p.log2_tiles;
    b.position = first_tile * TILE;
    const long long samples = p.samples - b.sample, most = p.span >> p.log2_tiles ? p.span >> p.log2_tiles : 1;
    const long long positions = p.positions - b.position, positions_most = p.span * TILE;
    const bool any = samples > 0 && positions > 0;
    b.samples = !any ? 0 : static_cast<int>(samples < most ? samples : most);
    b.run = !any ? 0 : b.channels * static_cast<int>(positions < positions_most ? positions : positions_most);
    b.piece = GROUPED ? b.run : TILE;
    b.pieces = GROUPED ? 1 : (b.run + TILE - 1) / TILE;
    return b;
}

// The run of one sample: x and dy in shared memory, all else in global.
struct Run {
    const ELEMENT* x;
    const ELEMENT* g;
    ELEMENT* y;
    ELEMENT* r;
    long long bit; // of the first element
};

__device__ __forceinline__ long long offset_of(const Operand& o, const Slab& b, int i) {
    return (b.sample + i) * o.sample + b.span.first_channel * o.channel + b.position;
}

// Where a slot has the element that is at `from`: equally far past a multiple of 16 bytes.
__device__ __forceinline__ ELEMENT* staged(unsigned char* slot, const ELEMENT* from) {
    return reinterpret_cast<ELEMENT*>(slot + bytes_past_vector(from));
}

__device__ __forceinline__ Run run_of(const Parameters& p, const Slab& b, unsigned char* slots, long long slots_bytes, int i) {
    const auto at = [&](const Operand& o) { return place<ELEMENT>(o, offset_of(o, b, i)); };
    unsigned char* slot = slots + i * p.slot;
    Run run{staged(slot, at(p.x)), nullptr, at(p.y), nullptr, 0};
    if (STAGED == 2) run.g = staged(slot + slots_bytes, at(p.g));
    else if (READS_G) run.g = at(p.g);
    if (WRITES_R) run.r = at(p.r);
    if (READS_BITS || WRITES_BITS)
        run.bit = p.bits_first + (b.sample + i) * p.bits_sample + b.span.first_channel * p.bits_channel + b.position;
    return run;
}

// Begin to copy piece k, if there is such a piece.
__device__ __forceinline__ void begin_piece(
    const Parameters& p, const Slab& b, unsigned char* slots, long long slots_bytes, int k
) {
    if (k < b.samples * b.pieces) {
        const int i = k / b.pieces, first = k % b.pieces * b.piece, rest = b.run - first;
        const int length = rest < b.piece ? rest : b.piece;
        const auto copy = [&](const Operand& o, unsigned char* slot) {
            const ELEMENT* from = place<const ELEMENT>(o, offset_of(o, b, i));
            begin_copies(staged(slot, from) + first, from + first, length);
        };
        copy(p.x, slots + i * p.slot);
        if (STAGED == 2) copy(p.g, slots + slots_bytes + i * p.slot);
    }
    end_group();
}

__device__ __forceinline__ Contiguous<ELEMENT> reader_of(
    Moments, const Parameters&, const Run& run, int first, const Coefficients<Acc>&
) {
    return {run.x + first, is_vector(run.x + first)};
}

__device__ __forceinline__ ContiguousPair<ELEMENT, GATE> reader_of(
    Sums, const Parameters& p, const Run& run, int first, const Coefficients<Acc>& c
) {
    const ELEMENT *x = run.x + first, *dy = run.g + first;
    const unsigned char* bits = reinterpret_cast<const unsigned char*>(p.bits);
    return {x, dy, is_vector(x), is_vector(dy), bits, run.bit + first, c};
}

// The nodes of piece k's tiles: one, or one for each channel of a group.
__device__ __forceinline__ void reduce_piece(
    const Parameters& p, const Slab& b, const Run& run, int k, const Coefficients<Acc>* coefficients, Node<double>* nodes
) {
    const int i = k / b.pieces, tile = k % b.pieces;
    const int positions = static_cast<int>(p.positions);
    const int rest = b.run - tile * TILE, alone = rest < TILE ? rest : TILE; // values of the tile of a single channel
#pragma unroll 1
    for (int g0 = 0; g0 < b.channels; g0 += 32 / TILE_LANES) {
        const int g = g0 + threadIdx.x % 32 / TILE_LANES;
        const bool there = g < b.channels;
        const int first = GROUPED ? g * positions : tile * TILE, length = GROUPED ? positions : alone;
        const auto reader = reader_of(Kind{}, p, run, there ? first : 0, coefficients[there ? g : 0]);
        const Node<double> node =
            Tile<Kind, TILE_LANES, TILE_ROWS>::template reduce<Acc>(reader, there ? length : 0, p.last);
        if (there && threadIdx.x % TILE_LANES == 0) nodes[g * b.span.tiles + (i << p.log2_tiles) + tile] = node;
    }
}

// The roots of the cluster's channels, CLUSTER nodes from one another, from those that its blocks have in `nodes`.
__device__ __forceinline__ void merge_cluster(const Parameters& p, const Slab& b, const Node<double>* nodes, Node<double>* roots) {
#if CLUSTER > 1
    cluster_sync();
    for (int k = threadIdx.x; k < CLUSTER * b.span.group; k += THREADS)
        roots[k] = cluster_map(nodes, k % CLUSTER)[k / CLUSTER * b.span.tiles];
    merge_span<Kind>(p, {CLUSTER, b.span.group, b.span.first_channel, 0, 0}, roots, p.span);
#endif
}

// What follows from the root of a channel; `is_first` of the cluster's blocks writes it.
__device__ __forceinline__ void finish_channel(
    const Parameters& p, long long c, Node<double> root, bool is_first, Coefficients<Acc>& coefficients
) {
    long long* count = reinterpret_cast<long long*>(p.count);
#if OPERATION == NORMALIZE
    const long long values = p.samples * p.positions;
    const Statistics s = statistics_of(root.first, root.second, values, p.eps);
    coefficients = coefficients_of<Acc>(p, c, s);
    if (is_first) store_statistics(p, c, s);
    if (is_first && c == 0) *count = values;
#else
    add_gradient(coefficients, root.first, root.second, *count, reinterpret_cast<const double*>(p.invstd)[c]);
    if (is_first) {
        reinterpret_cast<double*>(p.first)[c] = root.first;
        reinterpret_cast<double*>(p.second)[c] = root.second;
    }
#endif
}

// Elements [first, first + 8) of a run, as far as they are there.
__device__ __forceinline__ void apply_octet(
    const Parameters& p, const Slab& b, const Run& run, int first, const Coefficients<Acc>* coefficients,
    Coefficients<Acc> c, unsigned inverse
) {
    const bool whole = first >= 0 && first + OCTET <= b.run;
    const unsigned char* bits = reinterpret_cast<const unsigned char*>(p.bits);
    Octets<ELEMENT> v;
    v.passed = 0;
    if (whole) {
        if (READS_X) v.x = load_octet(run.x + first, is_vector(run.x + first));
        if (READS_G) v.g = load_octet(run.g + first, is_vector(run.g + first));
        if (READS_BITS) v.passed = load_bits(bits, run.bit + first);
    }
    int channel = 0, position = 0;
    if (GROUPED) {
        const unsigned from = first > 0 ? first : 0;
        channel = static_cast<int>(static_cast<unsigned long long>(from) * inverse >> 32);
        position = static_cast<int>(from) - channel * static_cast<int>(p.positions);
        c = coefficients[channel];
    }
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
        const int i = first + j;
        if (!whole && (i < 0 || i >= b.run)) continue;
        Element<ELEMENT> element = v.at(j);
        if (!whole) {
            if (READS_X) element.x = run.x[i];
            if (READS_G) element.g = run.g[i];
            if (READS_BITS) element.passed = load_bits(bits, run.bit + i) & 1;
        }
        compute(element, c);
        v.put(j, element);
        if (!whole) {
            run.y[i] = element.y;
            if (WRITES_R) run.r[i] = element.r;
        }
        if (GROUPED && ++position == p.positions && i + 1 < b.run) {
            position = 0;
            c = coefficients[++channel];
        }
    }
    if (whole) {
        store_octet(run.y + first, v.y, is_vector(run.y + first));
        if (WRITES_R) store_octet(run.r + first, v.r, is_vector(run.r + first));
    }
    if (WRITES_BITS) reinterpret_cast<unsigned char*>(p.bits)[(run.bit + first) / 8] = static_cast<unsigned char>(v.passed);
}

// Elements before the run that bring the first octet to a multiple of 16 bytes of y; bits want whole bytes instead.
__device__ __forceinline__ int skew_of(const ELEMENT* y) {
    return WRITES_BITS ? 0 : bytes_past_vector(y) / static_cast<int>(sizeof(ELEMENT));
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS) slab(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int rank = CLUSTER > 1 ? static_cast<int>(blockIdx.x % CLUSTER) : 0, warp = threadIdx.x / 32;
    const Slab b = slab_of(p, rank);
    unsigned char* slots = memory;
    const long long slots_bytes = (p.span >> p.log2_tiles ? p.span >> p.log2_tiles : 1) * p.slot;
    Node<double>* nodes = reinterpret_cast<Node<double>*>(slots + STAGED * slots_bytes);
    Node<double>* roots = CLUSTER > 1 ? nodes + p.span * p.group : nodes;
    const int apart = CLUSTER > 1 ? CLUSTER : b.span.tiles;
    Coefficients<Acc>* coefficients = reinterpret_cast<Coefficients<Acc>*>(roots + apart * p.group);

    for (int k = 0; k < AHEAD; ++k) begin_piece(p, b, slots, slots_bytes, warp + k * WARPS);
    if (Kind::NEEDS_COEFFICIENTS) {
        for (int g = threadIdx.x; g < b.channels; g += THREADS) {
            const long long c = b.span.first_channel + g;
            coefficients[g] = coefficients_of<Acc>(p, c, load_statistics(p, c));
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int k = warp; k < b.samples * b.pieces; k += WARPS) {
        begin_piece(p, b, slots, slots_bytes, k + AHEAD * WARPS);
        wait_for_groups<AHEAD>();
        __syncwarp();
        reduce_piece(p, b, run_of(p, b, slots, slots_bytes, k / b.pieces), k, coefficients, nodes);
    }
    merge_span<Kind>(p, b.span, nodes);
    merge_cluster(p, b, nodes, roots);
    for (int g = threadIdx.x; g < b.channels; g += THREADS)
        finish_channel(p, b.span.first_channel + g, roots[g * apart], rank == 0, coefficients[g]);
    __syncthreads();

    const Coefficients<Acc> c = coefficients[0];
    const unsigned inverse = 0xffffffffu / static_cast<unsigned>(p.positions) + 1; // 2^32 over positions, rounded up
    const bool alike = p.y.sample * static_cast<long long>(sizeof(ELEMENT)) % VECTOR_BYTES == 0;
    const int skew = alike ? skew_of(place<ELEMENT>(p.y, offset_of(p.y, b, 0))) : VECTOR_BYTES / sizeof(ELEMENT) - 1;
    const int octets = b.run ? (b.run + skew + OCTET - 1) / OCTET : 1; // of a sample, as many as any needs
    int i = threadIdx.x / octets, octet = threadIdx.x % octets;
    while (i < b.samples) {
        const Run run = run_of(p, b, slots, slots_bytes, i);
        const int first = octet * OCTET - skew_of(run.y);
        if (first < b.run) apply_octet(p, b, run, first, coefficients, c, inverse);
        i += THREADS / octets;
        octet += THREADS % octets;
        if (octet >= octets) {
            octet -= octets;
            ++i;
        }
    }
#if CLUSTER > 1
    cluster_sync(); // a block's nodes stay for as long as others read them
#endif
}
