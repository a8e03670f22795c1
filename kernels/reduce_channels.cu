// Nodes of rows of the tree from arrays whose channels lie one after the other: a thread owns VECTOR channels of 2^DEPTH
// neighbouring columns, a pass of a block 256 columns (of one tile, or of several short ones), a block `span` tiles.
//
// -DELEMENT=<type> -DKIND=<Moments|Sums> -DGATE=<gate> -DTILE_ROWS=<1|8> -DVECTOR=<channels of a thread>
// -DDEPTH=<log2 of a thread's columns> -DTILE_DEPTH=<log2 of a tile's columns, padded to a power of two>
#include "readers.cuh"
#include "span.cuh"

using Acc = Format<ELEMENT>::Acc;

// Blocks of a multiprocessor, or more, that registers are left for: a thread holds a node in double of each channel for
// each level above its tiles.
constexpr int BLOCKS = VECTOR * (DEPTH - TILE_DEPTH) < 4 ? 2 : 1;

constexpr int PASS_DEPTH = 8;
constexpr int WORKERS = 1 << (PASS_DEPTH - DEPTH); // threads that share a channel
constexpr int LANES = 256 / WORKERS;               // threads side by side over the channels
constexpr int WIDTH = LANES * VECTOR;              // channels of a block

constexpr int RUN_DEPTH = DEPTH < 3 ? DEPTH : 3;
constexpr int RUN = 1 << RUN_DEPTH; // columns of one value whose loads are under way together

struct alignas(sizeof(ELEMENT) * VECTOR) Vectors {
    ELEMENT v[VECTOR];
};

template <class A> struct Nodes {
    Node<A> v[VECTOR];
};

// A thread's channels in one tile.
struct Place {
    const ELEMENT* x;
    const ELEMENT* dy;
    long long x_step, dy_step; // from one position to the next
    long long first_bit, bit_step;
    int length;
    Shape shape;
    Acc pivot[VECTOR];
};

struct Worker {
    const Parameters& p;
    long long channel; // the first of VECTOR
    long long end;     // one past the last tile of the row
    bool even;         // every tile has the same number of values
    Coefficients<Acc> c[KIND::NEEDS_COEFFICIENTS ? VECTOR : 1];

    // Values of one channel in a tile of the row.
    __device__ __forceinline__ int length_of(long long tile) const {
        const long long sample = tile >> p.log2_tiles, t = tile & ((1LL << p.log2_tiles) - 1);
        if (tile >= end || sample >= p.samples || t >= p.tiles) return 0;
        const long long rest = p.positions - t * TILE;
        return rest < TILE ? static_cast<int>(rest) : TILE;
    }

    __device__ __forceinline__ Place place_of(long long tile) const {
        const long long sample = tile >> p.log2_tiles, position = (tile & ((1LL << p.log2_tiles) - 1)) * TILE;
        Place at;
        at.length = length_of(tile);
        at.shape = at.length == TILE ? Shape{ROWS, 0} : shape_of(at.length);
        at.x = reinterpret_cast<const ELEMENT*>(p.x.pointer) + sample * p.x.sample + position * p.x.position + channel;
        at.x_step = p.x.position;
        if (KIND::NEEDS_COEFFICIENTS) {
            at.dy = reinterpret_cast<const ELEMENT*>(p.g.pointer) + sample * p.g.sample + position * p.g.position + channel;
            at.dy_step = p.g.position;
            at.first_bit = p.bits_first + sample * p.bits_sample + position * p.bits_position + channel;
            at.bit_step = p.bits_position;
        } else if (at.length) {
            const Vectors first = *reinterpret_cast<const Vectors*>(at.x);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) at.pivot[i] = Format<ELEMENT>::widen(first.v[i]);
        }
        return at;
    }

    // Samples of one position, from one to the next.
    __device__ __forceinline__ Place samples_from(long long sample) const {
        Place at = place_of(sample);
        at.x_step = p.x.sample;
        at.dy_step = p.g.sample;
        at.bit_step = p.bits_sample;
        return at;
    }

    // A column of up to TILE_ROWS values.
    __device__ __forceinline__ Nodes<Acc> leaf(const Place& at, int column) const { return leaf(KIND{}, at, column); }

    __device__ __forceinline__ Nodes<Acc> leaf(Moments, const Place& at, int column) const {
        const int values = at.shape.values(column);
        Vectors rows[TILE_ROWS];
#pragma unroll
        for (int r = 0; r < TILE_ROWS; ++r)
            if (r < values) rows[r] = *reinterpret_cast<const Vectors*>(at.x + (r * COLUMNS + column) * at.x_step);
        Nodes<Acc> n;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            Acc v[TILE_ROWS];
#pragma unroll
            for (int r = 0; r < TILE_ROWS; ++r)
                v[r] = r < values ? subtract(Format<ELEMENT>::widen(rows[r].v[i]), at.pivot[i]) : Acc(0);
            n.v[i] = column_moments(v, values);
        }
        return n;
    }

    __device__ __forceinline__ Nodes<Acc> leaf(Sums, const Place& at, int column) const {
        const int values = at.shape.values(column);
        Nodes<Acc> n{};
#pragma unroll
        for (int r = 0; r < TILE_ROWS; ++r) {
            if (r >= values) continue;
            const long long position = r * COLUMNS + column;
            const Vectors x = *reinterpret_cast<const Vectors*>(at.x + position * at.x_step);
            const Vectors dy = *reinterpret_cast<const Vectors*>(at.dy + position * at.dy_step);
            const unsigned char* bits = reinterpret_cast<const unsigned char*>(p.bits);
            const unsigned passed =
                GATE == GATE_BITS ? load_bits(bits, at.first_bit + position * at.bit_step, VECTOR) : 0;
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                const Node<Acc> terms = terms_of<ELEMENT, GATE>(
                    Format<ELEMENT>::widen(x.v[i]), Format<ELEMENT>::widen(dy.v[i]), passed >> i & 1, c[i]
                );
                n.v[i] = r == 0 ? terms : Node<Acc>{add(n.v[i].first, terms.first), add(n.v[i].second, terms.second)};
            }
        }
        return n;
    }

    // The node of one value: a column, about the tile's pivot; or, in double, a sample of one position.
    __device__ __forceinline__ Node<Acc> column_of(Moments, Acc x, Acc, bool, Acc pivot, int) const {
        return {subtract(x, pivot), Acc(0)};
    }
    __device__ __forceinline__ Node<Acc> column_of(Sums, Acc x, Acc dy, bool passed, Acc, int i) const {
        return terms_of<ELEMENT, GATE>(x, dy, passed, c[i]);
    }
    __device__ __forceinline__ Node<double> sample_of(Acc x, Acc dy, bool passed, int i) const {
        const Node<Acc> n = column_of(KIND{}, x, dy, passed, x, i);
        const double first = to_double(n.first);
        return {KIND::NEEDS_COEFFICIENTS ? first : add(to_double(x), first), to_double(n.second)};
    }

    // The node of RUN neighbours of one value each, all of them there: columns of a tile from `first` on, or samples.
    template <bool SAMPLES> __device__ __forceinline__ auto run(const Place& at, int first) const {
        Vectors x[RUN], dy[RUN];
        unsigned passed[RUN];
#pragma unroll
        for (int k = 0; k < RUN; ++k) {
            const unsigned char* bits = reinterpret_cast<const unsigned char*>(p.bits);
            x[k] = *reinterpret_cast<const Vectors*>(at.x + (first + k) * at.x_step);
            if (KIND::NEEDS_COEFFICIENTS) dy[k] = *reinterpret_cast<const Vectors*>(at.dy + (first + k) * at.dy_step);
            passed[k] = GATE == GATE_BITS ? load_bits(bits, at.first_bit + (first + k) * at.bit_step, VECTOR) : 0;
        }
        const auto node = [&](int k, int i) {
            const Acc v = Format<ELEMENT>::widen(x[k].v[i]);
            const Acc g = KIND::NEEDS_COEFFICIENTS ? Format<ELEMENT>::widen(dy[k].v[i]) : Acc(0);
            if constexpr (SAMPLES) return sample_of(v, g, passed[k] >> i & 1, i);
            else return column_of(KIND{}, v, g, passed[k] >> i & 1, at.pivot[i], i);
        };
        using N = decltype(node(0, 0));
        using A = decltype(N::first);
        Nodes<A> result;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            N n[RUN];
#pragma unroll
            for (int k = 0; k < RUN; ++k) n[k] = node(k, i);
#pragma unroll
            for (int size = 1; size < RUN; size *= 2)
#pragma unroll
                for (int k = 0; k < RUN; k += 2 * size) {
                    const A half(0.5), weight(0.5 * size);
                    n[k] = size > 1 ? KIND::merge(n[k], n[k + size], half, weight)
                                    : KIND::merge_values(n[k], n[k + size], half, weight);
                }
            result.v[i] = n[0];
        }
        return result;
    }

    // A tile's node in double, about 0 and not the pivot.
    __device__ __forceinline__ Nodes<double> widened(const Place& at, const Nodes<Acc>& n) const {
        Nodes<double> wide;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const double first = to_double(n.v[i].first);
            wide.v[i] = {KIND::NEEDS_COEFFICIENTS ? first : add(to_double(at.pivot[i]), first), to_double(n.v[i].second)};
        }
        return wide;
    }

    __device__ __forceinline__ Node<double> merge_tiles(Node<double> a, Node<double> b, long long low, long long tiles) const {
        if (even) {
            const double values = from_integer(tiles * (p.positions >> p.log2_tiles));
            return KIND::merge(a, b, 0.5, multiply(values, 0.5));
        }
        const auto values = [&](long long i) { return values_before(p, i < end ? i : end); };
        const long long before = values(low), middle = values(low + tiles), after = values(low + 2 * tiles);
        return merge_counted<KIND>(a, middle - before, b, after - middle);
    }
};

// The node of 2^LEVEL columns of a tile. Two halves one after the other: as many nodes are alive as there are levels.
template <int LEVEL> struct ColumnsOf {
    static __device__ __forceinline__ Nodes<Acc> reduce(const Worker& w, const Place& at, int column) {
        constexpr int SIZE = 1 << (LEVEL - 1);
        Nodes<Acc> left{};
        if (at.shape.rows == 0 && at.shape.full <= column) return left;
        if constexpr (LEVEL == RUN_DEPTH && TILE_ROWS == 1)
            if (at.shape.rows == 1 || at.shape.full >= column + RUN) return w.template run<false>(at, column);
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const Nodes<Acc> n = ColumnsOf<LEVEL - 1>::reduce(w, at, column + half * SIZE);
            if (half == 0) {
                left = n;
            } else {
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    left.v[i] = merge_columns<KIND>(left.v[i], n.v[i], LEVEL - 1, column, at.shape, w.p.last);
            }
        }
        return left;
    }
};

template <> struct ColumnsOf<0> {
    static __device__ __forceinline__ Nodes<Acc> reduce(const Worker& w, const Place& at, int column) {
        return w.leaf(at, column);
    }
};

// The node of 2^LEVEL columns of whole tiles.
template <int LEVEL, bool IS_TILE = LEVEL == TILE_DEPTH> struct TilesOf {
    static __device__ __forceinline__ Nodes<double> reduce(const Worker& w, long long tile) {
        constexpr int TILES = 1 << (LEVEL - 1 - TILE_DEPTH);
        Nodes<double> left{};
        if constexpr (LEVEL == RUN_DEPTH && TILE_DEPTH == 0)
            if (w.even) return w.template run<true>(w.samples_from(tile), 0);
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const Nodes<double> n = TilesOf<LEVEL - 1>::reduce(w, tile + half * TILES);
            if (half == 0) {
                left = n;
            } else {
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) left.v[i] = w.merge_tiles(left.v[i], n.v[i], tile, TILES);
            }
        }
        return left;
    }
};

template <int LEVEL> struct TilesOf<LEVEL, true> {
    static __device__ __forceinline__ Nodes<double> reduce(const Worker& w, long long tile) {
        if (w.length_of(tile) == 0) return {};
        const Place at = w.place_of(tile);
        return w.widened(at, ColumnsOf<LEVEL>::reduce(w, at, 0));
    }
};

// What a thread makes of its columns: of whole tiles a node in double, of a part of one a node that waits for the rest.
template <bool WHOLE = (DEPTH >= TILE_DEPTH)> struct Share {
    static __device__ __forceinline__ Nodes<double> reduce(const Worker& w, long long tile, int) {
        return TilesOf<DEPTH>::reduce(w, tile);
    }
};

template <> struct Share<false> {
    static __device__ __forceinline__ Nodes<double> reduce(const Worker& w, long long tile, int column) {
        if (w.length_of(tile) == 0) return {};
        const Nodes<Acc> n = ColumnsOf<DEPTH>::reduce(w, w.place_of(tile), column);
        Nodes<double> wide;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) wide.v[i] = {to_double(n.v[i].first), to_double(n.v[i].second)};
        return wide;
    }
};

// Merge the nodes of two neighbours at 2^level columns each: inside a tile in Acc, above in double.
__device__ __forceinline__ Node<double> merge_shares(
    const Worker& w, Node<double> a, Node<double> b, int level, long long tile, int column, long long channel
) {
    if (level >= TILE_DEPTH) return w.merge_tiles(a, b, tile, 1LL << (level - TILE_DEPTH));
    const int length = w.length_of(tile);
    if (length == 0) return a;
    const Shape shape = length == TILE ? Shape{ROWS, 0} : shape_of(length);
    const Node<Acc> left{Rounded<Acc>::from(a.first), Rounded<Acc>::from(a.second)};
    const Node<Acc> right{Rounded<Acc>::from(b.first), Rounded<Acc>::from(b.second)};
    const Node<Acc> n = merge_columns<KIND>(left, right, level, column, shape, w.p.last);
    Node<double> wide{to_double(n.first), to_double(n.second)};
    if (level + 1 == TILE_DEPTH && !KIND::NEEDS_COEFFICIENTS) {
        const Operand& x = w.p.x;
        const long long sample = tile >> w.p.log2_tiles, position = (tile & ((1LL << w.p.log2_tiles) - 1)) * TILE;
        const ELEMENT pivot =
            reinterpret_cast<const ELEMENT*>(x.pointer)[sample * x.sample + position * x.position + channel];
        wide.first = add(to_double(Format<ELEMENT>::widen(pivot)), wide.first);
    }
    return wide;
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) reduce_channels(const __grid_constant__ Parameters p) {
    __shared__ Node<double> shares[WORKERS * WIDTH];
    extern __shared__ __align__(16) unsigned char memory[];
    Node<double>* passes = reinterpret_cast<Node<double>*>(memory); // of a pass, (channel, pass)
    const Span s = span_of(p, blockIdx.x);
    const int lane = threadIdx.x % LANES, worker = threadIdx.x / LANES;
    constexpr int PASS_TILES = 1 << (PASS_DEPTH - TILE_DEPTH);
    const int rounds = s.tiles > PASS_TILES ? s.tiles / PASS_TILES : 1;
    Worker w{p, s.first_channel + lane * VECTOR, s.base + s.tiles, false, {}};
    const bool inside = ((w.end + (1LL << p.log2_tiles) - 1) >> p.log2_tiles) <= p.samples;
    w.even = inside && s.tiles >= PASS_TILES && (p.log2_tiles == 0 || p.positions == TILE << p.log2_tiles);
    if (KIND::NEEDS_COEFFICIENTS && w.channel < p.channels)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) w.c[KIND::NEEDS_COEFFICIENTS ? i : 0] = load_coefficients<Acc>(p, w.channel + i);
    for (int round = 0; round < rounds; ++round) {
        const long long tile = s.base + round * PASS_TILES;
        const int column = worker << DEPTH;
        Nodes<double> share{};
        if (w.channel < p.channels)
            share = Share<>::reduce(w, tile + (column >> TILE_DEPTH), column & ((1 << TILE_DEPTH) - 1));
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) shares[worker * WIDTH + lane * VECTOR + i] = share.v[i];
#pragma unroll 1
        for (int level = DEPTH; level < PASS_DEPTH; ++level) {
            const int size = 1 << (level - DEPTH);
            __syncthreads();
            for (int k = threadIdx.x; k < WIDTH * (WORKERS / 2 / size); k += blockDim.x) {
                const int g = k % WIDTH, left = k / WIDTH * 2 * size, at = left << DEPTH;
                const long long channel = s.first_channel + g;
                if (channel >= p.channels) continue;
                Node<double>& node = shares[left * WIDTH + g];
                node = merge_shares(w, node, shares[(left + size) * WIDTH + g], level, tile + (at >> TILE_DEPTH),
                                    at & ((1 << TILE_DEPTH) - 1), channel);
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
    const auto values = [&](long long i) { return values_before(p, i < w.end ? i : w.end); };
    store_row(p, s, passes, rounds, values(w.end) - values(s.base));
}
