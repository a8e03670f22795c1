// A whole training step, or its whole gradient, where channels lie one after the other and a slice of them fits on chip:
// read from memory once, reduced in shared memory, and made into y or dx from there.
//
// CLUSTER blocks share a slice of SLICE bytes of neighbouring channels; each has `span` padded tiles, whose positions lie
// `position` elements apart, from one sample to the next as well. A warp stages and reduces pieces: columns of a tile, or
// of several short ones; only a block by itself has less than one. A block has read all that it works on before it
// writes any of it: y may be x, and dx may be dy.
//
// Shared memory: `slot` bytes of the slice's rows of x, as many of dy, a node of each piece and channel, roots of the
// cluster's blocks, coefficients. -DELEMENT=<type> -DTHREADS=<256|512> -DCLUSTER=<1|2|4|8> -DSLICE=<16|32|64> (eight
// channels, or more) -DTILE_ROWS=<1..8> -DDEPTH=<log2 of a lane's columns> -DTILE_DEPTH=<log2 of a tile's columns,
// padded to a power of two>, and what elementwise.cuh asks for.
#include "resident.cuh"
#include "staging.cuh"

constexpr int VECTOR = 8 / sizeof(ELEMENT); // channels of a lane
#include "columns.cuh"

constexpr int LANES = SLICE / 8; // side by side over the channels
constexpr int PIECE_DEPTH = DEPTH + (LANES == 2 ? 4 : LANES == 4 ? 3 : 2);
constexpr int WIDTH = SLICE / sizeof(ELEMENT); // channels of a block
constexpr int OCTETS = WIDTH / OCTET;
constexpr int WARPS = THREADS / 32;
constexpr int AHEAD = TILE_ROWS == 1 ? 4 : 1; // pieces of a warp whose copies are under way
constexpr int BATCH = OPERATION == NORMALIZE && RESIDUAL ? 8 / sizeof(ELEMENT) : 1; // octets of residual under way
constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 1 : 512 / THREADS; // of a multiprocessor, that registers must be left for

// log2 of the pieces of a tile, or of the tiles of a piece.
constexpr int PIECES_DEPTH = TILE_DEPTH > PIECE_DEPTH ? TILE_DEPTH - PIECE_DEPTH : 0;
constexpr int TILES_DEPTH = TILE_DEPTH < PIECE_DEPTH ? PIECE_DEPTH - TILE_DEPTH : 0;

// What a block works on.
struct Slab {
    Span span;
    int channels;          // of WIDTH, those that are there
    long long first_row;   // rows are positions of all samples
    int rows, pieces;
    unsigned char *x, *dy; // slots, in shared memory
    __device__ __forceinline__ long long end() const { return span.base + span.tiles; }
    // Of an operand in global memory, the first element.
    __device__ __forceinline__ ELEMENT* first(const Operand& o) const {
        return place<ELEMENT>(o, first_row * o.position + span.first_channel);
    }
};

__device__ __forceinline__ Slab slab_of(const Parameters& p, int rank, unsigned char* shared) {
    Slab b;
    b.span = {static_cast<int>(p.span), WIDTH, static_cast<long long>(blockIdx.x / CLUSTER) * WIDTH, rank, rank * p.span};
    const long long channels = p.channels - b.span.first_channel;
    b.channels = static_cast<int>(channels < WIDTH ? channels : WIDTH);
    b.first_row = values_before(p, b.span.base);
    b.rows = static_cast<int>(values_before(p, b.end()) - b.first_row);
    const int pieces = b.span.tiles << PIECES_DEPTH >> TILES_DEPTH;
    b.pieces = pieces ? pieces : 1;
    b.x = shared;
    b.dy = shared + p.slot;
    return b;
}

// Columns of a tile and the next ones of tiles behind it.
struct Piece {
    long long tile;
    int column;
};

__device__ __forceinline__ Piece piece_of(const Slab& b, int k) {
    return {b.span.base + (k >> PIECES_DEPTH << TILES_DEPTH), (k & ((1 << PIECES_DEPTH) - 1)) << PIECE_DEPTH};
}

// A row in its slot. Lanes read rows that are 2^DEPTH apart: those at the same banks change places with neighbours.
__device__ __forceinline__ unsigned char* staged(unsigned char* slot, int row) {
    return slot + (row ^ (row >> DEPTH & (16 / LANES - 1))) * SLICE;
}

// Begin to copy `count` rows of a slot, ITEMS elements at a time.
template <int ITEMS>
__device__ __forceinline__ void begin_rows(
    const Slab& b, unsigned char* slot, const ELEMENT* from, long long step, int first, int count
) {
    constexpr int ACROSS = WIDTH / ITEMS;
    const int lane = threadIdx.x % 32, channel = lane % ACROSS * ITEMS;
    if (channel >= b.channels) return;
    const ELEMENT* source = from + (first + lane / ACROSS) * step + channel;
#pragma unroll 4
    for (int i = lane / ACROSS; i < count; i += 32 / ACROSS, source += 32 / ACROSS * step) {
        ELEMENT* target = reinterpret_cast<ELEMENT*>(staged(slot, first + i)) + channel;
        if (ITEMS > 1) begin_copy(reinterpret_cast<uint4*>(target), reinterpret_cast<const uint4*>(source));
        else *target = *source;
    }
}

// Whether vectors of an operand begin at multiples of 16 bytes, and none reaches beyond the channels.
__device__ __forceinline__ bool has_vectors(const Slab& b, const Operand& o) {
    return o.vectors && b.channels * static_cast<int>(sizeof(ELEMENT)) % VECTOR_BYTES == 0;
}

// Begin to copy piece k, if there is one.
__device__ __forceinline__ void begin_piece(const Parameters& p, const Slab& b, int k) {
    if (k < b.pieces) {
        const Piece piece = piece_of(b, k);
        const int length = static_cast<int>(values_between(p, piece.tile, piece.tile + (1 << TILES_DEPTH)));
        const int start = static_cast<int>(values_before(p, piece.tile) - b.first_row);
        const auto copy = [&](const Operand& o, unsigned char* slot, int first, int count) {
            constexpr int ITEMS = VECTOR_BYTES / sizeof(ELEMENT);
            if (has_vectors(b, o)) begin_rows<ITEMS>(b, slot, b.first(o), o.position, first, count);
            else begin_rows<1>(b, slot, b.first(o), o.position, first, count);
        };
#pragma unroll 1
        for (int r = 0; r < TILE_ROWS; ++r) {
            const int at = r * COLUMNS + piece.column, left = length - at;
            const int count = left < 1 << PIECE_DEPTH ? left : 1 << PIECE_DEPTH;
            copy(p.x, b.x, start + at, count);
            if (STAGED == 2) copy(p.g, b.dy, start + at, count);
        }
    }
    end_group();
}

// Values in shared memory; see columns.cuh.
struct Staged {
    const Parameters& p;
    const Slab& b;
    int channel; // of the block, the first of the thread's

    struct Rows {
        unsigned char* slot;
        int first, channel;
        __device__ __forceinline__ Vectors operator[](int i) const {
            return *reinterpret_cast<const Vectors*>(staged(slot, first + i) + channel * sizeof(ELEMENT));
        }
    };

    __device__ __forceinline__ int row(long long sample, long long position) const {
        return static_cast<int>(sample * p.positions + position - b.first_row);
    }
    __device__ __forceinline__ Rows x(long long sample, long long position) const {
        return {b.x, row(sample, position), channel};
    }
    __device__ __forceinline__ Rows dy(long long sample, long long position) const {
        return {b.dy, row(sample, position), channel};
    }
    // Of a tile of several pieces from memory: others stage it.
    __device__ __forceinline__ Vectors pivot(const Rows& rows, long long, long long) const {
        if (PIECES_DEPTH == 0) return rows[0];
        const ELEMENT* from = b.first(p.x) + rows.first * p.x.position + channel;
        if (has_vectors(b, p.x)) return *reinterpret_cast<const Vectors*>(from);
        Vectors v{};
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            if (channel + i < b.channels) v.v[i] = from[i];
        return v;
    }
    __device__ __forceinline__ ELEMENT value(long long sample, long long position, int g) const {
        return reinterpret_cast<const ELEMENT*>(staged(b.x, row(sample, position)))[g];
    }
};

// The nodes of two neighbours of 2^LEVEL columns of channel g: in a tile in Acc, from a whole one on in double.
template <int LEVEL, class A>
__device__ __forceinline__ auto merge_workers(
    const Worker<Staged>& w, Node<A> a, Node<A> b, long long tile, int column, int g
) {
    if constexpr (LEVEL >= TILE_DEPTH) {
        return w.merge_tiles(a, b, tile, 1LL << (LEVEL - TILE_DEPTH));
    } else {
        const int length = w.length_of(tile);
        const Node<Acc> n = TILE_ROWS == 1 ? merge_row<KIND>(a, b, LEVEL, length - column, w.p.last)
                                           : w.merge_in_tile(a, b, LEVEL, tile, column);
        if constexpr (LEVEL + 1 < TILE_DEPTH) return n;
        else return w.widened(n, KIND::NEEDS_COEFFICIENTS || !length ? Acc(0) : w.pivot_of(tile, g));
    }
}

// The workers of a warp have nodes of 2^LEVEL columns, of COUNT channels from g on: merge them to the node of the piece,
// of channel g. From level to level a lane keeps half of its channels, while there are several.
template <int LEVEL, int COUNT, class A>
__device__ __forceinline__ Node<double> merge_lanes(
    const Worker<Staged>& w, const Node<A> (&n)[COUNT], const Piece& piece, int& g
) {
    if constexpr (LEVEL == PIECE_DEPTH) {
        return {to_double(n[0].first), to_double(n[0].second)};
    } else {
        constexpr int KEPT = COUNT > 1 ? COUNT / 2 : 1, OFFSET = LANES << (LEVEL - DEPTH);
        const bool right = threadIdx.x & OFFSET;
        const int low = (threadIdx.x % 32 / LANES << DEPTH) & ~((2 << LEVEL) - 1);
        const long long tile = piece.tile + (low >> TILE_DEPTH);
        const int column = piece.column + (low & ((1 << TILE_DEPTH) - 1));
        if (COUNT > 1 && right) g += KEPT;
        decltype(merge_workers<LEVEL>(w, n[0], n[0], tile, column, g)) merged[KEPT];
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            const Node<A>&low_channel = n[i], &high_channel = n[COUNT - KEPT + i];
            const Node<A> kept = right ? high_channel : low_channel;
            const Node<A> other = shuffle_node(right ? low_channel : high_channel, OFFSET);
            merged[i] = merge_workers<LEVEL>(w, right ? other : kept, right ? kept : other, tile, column, g + i);
        }
        return merge_lanes<LEVEL + 1>(w, merged, piece, g);
    }
}

__device__ __forceinline__ void reduce_piece(const Worker<Staged>& w, const Slab& b, int k, Node<double>* nodes) {
    const Piece piece = piece_of(b, k);
    const int worker = threadIdx.x % 32 / LANES, column = worker << DEPTH;
    int g = w.memory.channel;
    decltype(Share<>::reduce(w, piece.tile, column)) share{};
    if (g < b.channels)
        share = Share<>::reduce(
            w, piece.tile + (column >> TILE_DEPTH), piece.column + (column & ((1 << TILE_DEPTH) - 1))
        );
    const Node<double> node = merge_lanes<DEPTH>(w, share.v, piece, g);
    if (worker < VECTOR) nodes[k * WIDTH + g] = node; // the others have the same
}

// The nodes of all pieces, WIDTH apart, into the first.
__device__ __forceinline__ void merge_pieces(const Worker<Staged>& w, const Slab& b, Node<double>* nodes) {
    for (int size = 1, level = PIECE_DEPTH; size < b.pieces; size *= 2, ++level) {
        __syncthreads();
        for (int k = threadIdx.x; k < WIDTH * (b.pieces / 2 / size); k += THREADS) {
            const int g = k % WIDTH, left = k / WIDTH * 2 * size;
            if (g >= b.channels) continue;
            const Piece piece = piece_of(b, left);
            Node<double>& node = nodes[left * WIDTH + g];
            node = w.merge_shares(node, nodes[(left + size) * WIDTH + g], level, piece.tile, piece.column, g);
        }
    }
    __syncthreads();
}

// The channels from c on that are there, fewer than eight, in every row; then there are no bits.
__device__ __forceinline__ void apply_part(const Parameters& p, const Slab& b, int c, const Coefficients<Acc>* coefficients) {
#pragma unroll 1
    for (int row = threadIdx.x / OCTETS; row < b.rows; row += THREADS / OCTETS) {
        const auto at = [&](unsigned char* slot) { return reinterpret_cast<const ELEMENT*>(staged(slot, row)); };
        const auto row_of = [&](const Operand& o) { return b.first(o) + row * o.position; };
#pragma unroll 1
        for (int i = c; i < b.channels; ++i) {
            Element<Acc> element{};
            if (READS_X) element.x = Format<ELEMENT>::widen(at(b.x)[i]);
            if (READS_G) element.g = Format<ELEMENT>::widen(STAGED == 2 ? at(b.dy)[i] : row_of(p.g)[i]);
            compute<ELEMENT>(element, coefficients[i]);
            row_of(p.y)[i] = Format<ELEMENT>::round(element.y);
            if (WRITES_R) row_of(p.r)[i] = Format<ELEMENT>::round(element.r);
        }
    }
}

// An octet of channels, in every row.
template <bool DENSE>
__device__ __forceinline__ void apply(const Parameters& p, const Slab& b, const Coefficients<Acc>* coefficients) {
    constexpr int DOWN = THREADS / OCTETS;
    const int c = threadIdx.x % OCTETS * OCTET;
    if (c + OCTET > b.channels) {
        if (c < b.channels) apply_part(p, b, c, coefficients);
        return;
    }
    unsigned char* bits = reinterpret_cast<unsigned char*>(p.bits);
    ELEMENT *g_first = b.first(p.g) + c, *y_first = b.first(p.y) + c, *r_first = b.first(p.r) + c;
    Coefficients<Acc> k[OCTET];
#pragma unroll
    for (int j = 0; j < OCTET; ++j) k[j] = coefficients[c + j];
#pragma unroll 1
    for (int first = threadIdx.x / OCTETS; first < b.rows; first += BATCH * DOWN) {
        Octet<ELEMENT> g[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int row = first + i * DOWN;
            if (READS_G && STAGED == 1 && row < b.rows)
                g[i] = load_octet(g_first + row * p.g.position, DENSE || p.g.vectors);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int row = first + i * DOWN;
            if (row >= b.rows) continue;
            const auto octet = [&](unsigned char* slot) {
                return load_octet(reinterpret_cast<const ELEMENT*>(staged(slot, row)) + c, true);
            };
            const long long bit = p.bits_first + (b.first_row + row) * p.bits_position + b.span.first_channel + c;
            Octets<ELEMENT> v;
            if (READS_X) to_numbers(octet(b.x), v.x);
            if (READS_G) to_numbers(STAGED == 2 ? octet(b.dy) : g[i], v.g);
            v.passed = READS_BITS ? bits[bit / 8] : 0;
#pragma unroll
            for (int j = 0; j < OCTET; ++j) {
                Element<Acc> element = v.at(j);
                compute<ELEMENT>(element, k[j]);
                v.put(j, element);
            }
            store_octet(y_first + row * p.y.position, rounded<ELEMENT>(v.y), DENSE || p.y.vectors);
            if (WRITES_R) store_octet(r_first + row * p.r.position, rounded<ELEMENT>(v.r), DENSE || p.r.vectors);
            if (WRITES_BITS) bits[bit / 8] = static_cast<unsigned char>(v.passed);
        }
    }
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS)
slab_channels(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int rank = CLUSTER > 1 ? static_cast<int>(blockIdx.x % CLUSTER) : 0, warp = threadIdx.x / 32;
    const Slab b = slab_of(p, rank, memory);
    Node<double>* nodes = reinterpret_cast<Node<double>*>(b.x + STAGED * p.slot);
    Node<double>* roots = CLUSTER > 1 ? nodes + b.pieces * WIDTH : nodes;
    Coefficients<Acc>* coefficients = reinterpret_cast<Coefficients<Acc>*>(roots + (CLUSTER > 1 ? CLUSTER : b.pieces) * WIDTH);

    for (int k = 0; k < AHEAD; ++k) begin_piece(p, b, warp + k * WARPS);
    const int channel = threadIdx.x % LANES * VECTOR;
    Worker<Staged> w(p, {p, b, channel}, b.span.first_channel + channel, b.end());
    const int own = THREADS - 1 - threadIdx.x; // the channel that the thread finishes
    const bool has_own = own < b.channels;
    if (has_own) coefficients[own] = known_coefficients<Acc>(p, b.span.first_channel + own);
    if (KIND::NEEDS_COEFFICIENTS) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) w.c[KIND::NEEDS_COEFFICIENTS ? i : 0] = coefficients[channel + i];
    }
#pragma unroll 1
    for (int k = warp; k < b.pieces; k += WARPS) {
        begin_piece(p, b, k + AHEAD * WARPS);
        wait_for_groups<AHEAD>();
        __syncwarp();
        reduce_piece(w, b, k, nodes);
    }
    Channel finished{};
    if (has_own) finished.load(p, b.span.first_channel + own, rank == 0);
    merge_pieces(w, b, nodes);
    merge_cluster(p, b.span, nodes, 1, roots);
    if (has_own) finished.finish(p, roots[CLUSTER > 1 ? own * CLUSTER : own], coefficients[own]);
    __syncthreads();

    if (has_own && rank == 0) finished.store(p);
    if (p.dense) apply<true>(p, b, coefficients);
    else apply<false>(p, b, coefficients);
#if CLUSTER > 1
    cluster_sync(); // a block's nodes stay for as long as others read them
#endif
}
