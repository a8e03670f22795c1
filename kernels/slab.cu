// A whole training step, or its whole gradient, of channels whose values fit on chip: read from memory once, reduced in
// shared memory, and made into y or dx from there.
//
// CLUSTER blocks share `group` neighbouring channels of arrays whose positions lie one after the other, each has `span`
// padded tiles of them. In a group of several, a sample has one tile and channels lie one after the other as well.
// A block has read all that it works on before it writes any of it: y may be x, and dx may be dy.
//
// Shared memory: `slot` bytes of x for each sample of the block, as many of dy, nodes, roots of the cluster's blocks,
// coefficients. -DELEMENT=<type> -DTHREADS=<256|512> -DCLUSTER=<1|2|4|8> -DGROUPED=<0|1> (more than one channel)
// -DALIGNED=<0|1>: whether octets of x and dy are whole, and begin at multiples of 16 bytes.
// -DTILE_ROWS=<0..8> -DTALL=<0|1>: ROW_LIMIT and IS_TALL of reduce_tile. -DTILE_LANES=<1..32>: of a tile of one row.
// And what elementwise.cuh asks for.
#include "resident.cuh"
#include "staging.cuh"
#include "walk.cuh"

using Acc = Format<ELEMENT>::Acc;

constexpr bool BY_ROWS = TILE_ROWS == 1 && !TALL; // lanes reduce rows of positions, whichever warp has copied them
constexpr int KEPT = GROUPED ? OCTET : 1; // coefficients that a thread keeps: of its octet's elements, or of the channel
constexpr int WARPS = THREADS / WARP;
constexpr int AHEAD = 4; // pieces of a warp whose copies are under way
constexpr int BATCH = OPERATION == NORMALIZE && RESIDUAL ? 8 / sizeof(ELEMENT) : 1; // octets of residual under way
constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 1 : 512 / THREADS; // of a multiprocessor, that registers must be left for

// What a block works on: of neighbouring samples the same `run` of elements, in pieces that warps stage and reduce.
struct Slab {
    Span span;
    long long sample, position; // the first
    int samples, channels, run;
    int pieces; // of a sample: its tiles, or one of all the group's
    unsigned char *x, *dy; // slots of the samples, in shared memory
    ELEMENT *x_first, *g_first, *y_first, *r_first; // in global memory
};

__device__ __forceinline__ Slab slab_of(const Parameters& p, int rank, unsigned char* shared) {
    Slab b;
    const long long group = GROUPED ? p.group : 1; // known where it is one: registers are scarce
    b.span = {static_cast<int>(p.span), static_cast<int>(group), blockIdx.x / CLUSTER * group, rank, rank * p.span};
    const long long channels = p.channels - b.span.first_channel;
    b.channels = static_cast<int>(GROUPED && channels < group ? channels : group);
    b.sample = b.span.base >> p.log2_tiles;
    b.position = (b.span.base & ((1LL << p.log2_tiles) - 1)) * TILE;
    const long long slots = p.span >> p.log2_tiles ? p.span >> p.log2_tiles : 1, room = p.span * TILE;
    const long long samples = p.samples - b.sample, positions = p.positions - b.position;
    const bool any = samples > 0 && positions > 0;
    b.samples = !any ? 0 : static_cast<int>(samples < slots ? samples : slots);
    b.run = !any ? 0 : b.channels * static_cast<int>(positions < room ? positions : room);
    b.pieces = GROUPED || b.run <= TILE ? 1 : (b.run + TILE - 1) / TILE;
    b.x = shared;
    b.dy = shared + slots * p.slot;
    const auto first = [&](const Operand& o) {
        return place<ELEMENT>(o, b.sample * o.sample + b.span.first_channel * o.channel + b.position);
    };
    b.x_first = first(p.x);
    b.g_first = first(p.g);
    b.y_first = first(p.y);
    b.r_first = first(p.r);
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

// Where a slot has the element that is at `from`: equally far past a multiple of 16 bytes.
__device__ __forceinline__ ELEMENT* staged(unsigned char* slot, const ELEMENT* from) {
    return reinterpret_cast<ELEMENT*>(ALIGNED ? slot : slot + bytes_past_vector(from));
}

__device__ __forceinline__ Run run_of(const Parameters& p, const Slab& b, int i) {
    const int slot = static_cast<int>(p.slot);
    Run run{staged(b.x + i * slot, b.x_first + i * p.x.sample), nullptr, b.y_first + i * p.y.sample, nullptr, 0};
    if (STAGED == 2) run.g = staged(b.dy + i * slot, b.g_first + i * p.g.sample);
    else if (READS_G) run.g = b.g_first + i * p.g.sample;
    if (WRITES_R) run.r = b.r_first + i * p.r.sample;
    if (READS_BITS || WRITES_BITS)
        run.bit = p.bits_first + (b.sample + i) * p.bits_sample + b.span.first_channel * p.bits_channel + b.position;
    return run;
}

// Elements of a piece.
__device__ __forceinline__ int length_of(const Slab& b, int piece) {
    const int rest = b.run - piece * TILE;
    return GROUPED ? b.run : rest < TILE ? rest : TILE;
}

// Begin to copy a piece of sample i, if there is such a sample.
__device__ __forceinline__ void begin_piece(const Parameters& p, const Slab& b, int i, int piece) {
    if (i < b.samples) {
        const auto copy = [&](const ELEMENT* from, unsigned char* slot) {
            begin_copies<ALIGNED>(staged(slot, from) + piece * TILE, from + piece * TILE, length_of(b, piece));
        };
        copy(b.x_first + i * p.x.sample, b.x + i * p.slot);
        if (STAGED == 2) copy(b.g_first + i * p.g.sample, b.dy + i * p.slot);
    }
    end_group();
}

__device__ __forceinline__ Contiguous<ELEMENT> reader_of(
    Moments, const Parameters& p, const Run& run, int first, const Coefficients<Acc>&
) {
    const ELEMENT* x = run.x + first;
    return {x, ALIGNED, has_fours(x, p.positions)};
}

__device__ __forceinline__ ContiguousPair<ELEMENT, GATE> reader_of(
    Sums, const Parameters& p, const Run& run, int first, const Coefficients<Acc>& c
) {
    const ELEMENT *x = run.x + first, *dy = run.g + first;
    const unsigned char* bits = reinterpret_cast<const unsigned char*>(p.bits);
    const bool fours = has_fours(x, p.positions) && has_fours(dy, p.positions);
    return {x, dy, ALIGNED, fours, bits, run.bit + first, c};
}

// The nodes of a piece of sample i: of one tile, or of one for each channel of a group.
__device__ __forceinline__ void reduce_piece(
    const Parameters& p, const Slab& b, const Run& run, int i, int piece, const Coefficients<Acc>* coefficients,
    Node<double>* nodes
) {
    const int positions = static_cast<int>(p.positions);
    const int length = TALL && !GROUPED ? length_of(b, piece) : positions; // the same for all where it can be
    Node<double>* of_piece = nodes + (i << p.log2_tiles) + piece;
#pragma unroll 1
    for (int g = 0; g < b.channels; ++g) {
        const auto reader = reader_of(KIND{}, p, run, GROUPED ? g * positions : piece * TILE, coefficients[g]);
        const Node<double> node = reduce_tile<KIND, WARP, TILE_ROWS, TALL, Acc>(reader, length, p.last);
        if (threadIdx.x % WARP == 0) of_piece[g * b.span.tiles] = node;
    }
}

// The nodes of all rows of a block, of positions of one tile of one row.
__device__ __forceinline__ void reduce_rows(
    const Parameters& p, const Slab& b, const Coefficients<Acc>* coefficients, Node<double>* nodes
) {
    constexpr int AT_ONCE = THREADS / TILE_LANES;
    const int positions = static_cast<int>(p.positions), rows = b.samples * b.channels;
    Walk at(threadIdx.x / TILE_LANES, AT_ONCE, b.channels);
#pragma unroll 1
    for (int first = 0; first < rows; first += AT_ONCE, at.step()) { // as often for all lanes of a warp
        const bool there = at.i < b.samples;
        const Run run = run_of(p, b, there ? at.i : 0);
        const auto reader = reader_of(KIND{}, p, run, at.j * positions, coefficients[at.j]);
        const Node<double> node = reduce_tile<KIND, TILE_LANES, TILE_ROWS, TALL, Acc>(reader, positions, p.last);
        if (there && threadIdx.x % TILE_LANES == 0) nodes[at.j * b.span.tiles + at.i] = node;
    }
}

__device__ __forceinline__ bool is_whole(const Slab& b, int first) { return first >= 0 && first + OCTET <= b.run; }

// Which channel of a group an element of a run belongs to; inverse is 2^32 over positions, rounded up.
__device__ __forceinline__ int channel_of(int i, unsigned inverse) {
    return GROUPED ? static_cast<int>(high_half(static_cast<unsigned>(i), inverse)) : 0;
}

__device__ __forceinline__ void store_bits(const Parameters& p, const Run& run, int first, unsigned passed) {
    if (WRITES_BITS)
        reinterpret_cast<unsigned char*>(p.bits)[(run.bit + first) / 8] = static_cast<unsigned char>(passed);
}

// Elements [first, first + 8) of a run, all of them there; `g` is their residual or dy, `c` their coefficients.
__device__ __forceinline__ void apply_whole(
    const Parameters& p, const Run& run, int first, const Octet<ELEMENT>& g, const Coefficients<Acc> (&c)[KEPT]
) {
    Octets<ELEMENT> v;
    if (READS_X) to_numbers(load_octet(run.x + first, is_vector(run.x + first)), v.x);
    if (READS_G) to_numbers(g, v.g);
    v.passed = READS_BITS ? load_bits(reinterpret_cast<const unsigned char*>(p.bits), run.bit + first, OCTET) : 0;
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
        Element<Acc> element = v.at(j);
        compute<ELEMENT>(element, c[j % KEPT]);
        v.put(j, element);
    }
    store_octet(run.y + first, rounded<ELEMENT>(v.y), is_vector(run.y + first));
    if (WRITES_R) store_octet(run.r + first, rounded<ELEMENT>(v.r), is_vector(run.r + first));
    store_bits(p, run, first, v.passed);
}

// Those that are there of elements [first, first + 8).
__device__ __forceinline__ void apply_part(
    const Parameters& p, const Slab& b, const Run& run, int first, const Coefficients<Acc>* coefficients, unsigned inverse
) {
    const unsigned char* bits = reinterpret_cast<const unsigned char*>(p.bits);
    unsigned passed = 0;
#pragma unroll 1
    for (int i = first > 0 ? first : 0; i < first + OCTET && i < b.run; ++i) {
        Element<Acc> element{};
        if (READS_X) element.x = Format<ELEMENT>::widen(run.x[i]);
        if (READS_G) element.g = Format<ELEMENT>::widen(run.g[i]);
        if (READS_BITS) element.passed = load_bits(bits, run.bit + i, 1) & 1;
        compute<ELEMENT>(element, coefficients[channel_of(i, inverse)]);
        run.y[i] = Format<ELEMENT>::round(element.y);
        if (WRITES_R) run.r[i] = Format<ELEMENT>::round(element.r);
        passed |= static_cast<unsigned>(element.passed) << (i - first);
    }
    store_bits(p, run, first, passed);
}

// Elements before the run that bring the first octet to a multiple of 16 bytes of y; bits want whole bytes instead.
__device__ __forceinline__ int skew_of(const ELEMENT* y) {
    return WRITES_BITS ? 0 : bytes_past_vector(y) / static_cast<int>(sizeof(ELEMENT));
}

// y, or dx and dresidual. A thread stays at an octet of a sample and goes from sample to sample.
__device__ __forceinline__ void apply(const Parameters& p, const Slab& b, const Coefficients<Acc>* coefficients) {
    const unsigned inverse = 0xffffffffu / static_cast<unsigned>(p.positions) + 1;
    const bool alike = p.y.sample * static_cast<long long>(sizeof(ELEMENT)) % VECTOR_BYTES == 0;
    const int skew = alike ? skew_of(b.y_first) : VECTOR_BYTES / sizeof(ELEMENT) - 1;
    const int octets = b.run ? (b.run + skew + OCTET - 1) / OCTET : 1; // of a sample, as many as any needs
    const int rounds = (octets + THREADS - 1) / THREADS, across = (octets + rounds - 1) / rounds;
    const int at_once = THREADS / across, sample = threadIdx.x / across;
    for (int octet = threadIdx.x % across; sample < at_once && octet < octets; octet += across) {
        const auto first_of = [&](const Run& run) { return octet * OCTET - skew_of(run.y); };
        Coefficients<Acc> c[KEPT] = {coefficients[0]};
        int kept = b.run; // the first of the elements whose coefficients these are
#pragma unroll 1
        for (int i = sample; i < b.samples; i += BATCH * at_once) {
            Octet<ELEMENT> g[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                if (!READS_G || i + k * at_once >= b.samples) continue;
                const Run run = run_of(p, b, i + k * at_once);
                const int first = first_of(run);
                if (is_whole(b, first)) g[k] = load_octet(run.g + first, is_vector(run.g + first));
            }
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                if (i + k * at_once >= b.samples) continue;
                const Run run = run_of(p, b, i + k * at_once);
                const int first = first_of(run);
                if (!is_whole(b, first)) {
                    if (first < b.run) apply_part(p, b, run, first, coefficients, inverse);
                    continue;
                }
                if (GROUPED && first != kept) {
#pragma unroll
                    for (int j = 0; j < KEPT; ++j) c[j] = coefficients[channel_of(first + j, inverse)];
                    kept = first;
                }
                apply_whole(p, run, first, g[k], c);
            }
        }
    }
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS) slab(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int rank = static_cast<int>(cluster_rank()), warp = threadIdx.x / WARP;
    const Slab b = slab_of(p, rank, memory);
    Node<double>* nodes = reinterpret_cast<Node<double>*>(b.x + STAGED * (b.dy - b.x));
    Node<double>* roots = CLUSTER > 1 ? nodes + p.span * p.group : nodes;
    const int apart = CLUSTER > 1 ? CLUSTER : b.span.tiles;
    Coefficients<Acc>* coefficients = reinterpret_cast<Coefficients<Acc>*>(roots + apart * p.group);

    Walk ahead(warp, WARPS, b.pieces), here = ahead;
    for (int k = 0; BY_ROWS ? ahead.i < b.samples : k < AHEAD; ++k, ahead.step()) begin_piece(p, b, ahead.i, ahead.j);
    const int own = THREADS - 1 - threadIdx.x; // the channel that the thread finishes: the last threads have least to do
    const bool has_own = own < b.channels;
    if (has_own) coefficients[own] = known_coefficients<Acc>(p, b.span.first_channel + own);
    if (KIND::NEEDS_COEFFICIENTS) __syncthreads();
    if (BY_ROWS) {
        wait_for_groups<0>();
        __syncthreads();
        reduce_rows(p, b, coefficients, nodes);
    }
#pragma unroll 1
    for (; !BY_ROWS && here.i < b.samples; here.step(), ahead.step()) {
        begin_piece(p, b, ahead.i, ahead.j);
        wait_for_groups<AHEAD>();
        __syncwarp();
        reduce_piece(p, b, run_of(p, b, here.i), here.i, here.j, coefficients, nodes);
    }
    Channel channel{};
    if (has_own) channel.load(p, b.span.first_channel + own, rank == 0);
    merge_span<KIND>(p, b.span, nodes);
    merge_cluster(p, b.span, nodes, b.span.tiles, roots);
    if (has_own) channel.finish(p, roots[own * apart], coefficients[own]);
    __syncthreads();

    if (has_own && rank == 0) channel.store(p);
    apply(p, b, coefficients);
#if CLUSTER > 1
    cluster_sync(); // a block's nodes stay for as long as others read them
#endif
}
