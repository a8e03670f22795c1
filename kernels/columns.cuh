// Nodes of columns where channels lie one after the other: of 2^DEPTH neighbouring columns, of one tile or of several
// short ones, and of VECTOR channels, by one thread.
//
// ELEMENT, KIND, GATE, TILE_ROWS (1 to 8: of the first tile), VECTOR, DEPTH and TILE_DEPTH (log2 of a tile's columns, padded to a power of
// two) are macros or constants. A class Memory knows where values are:
//     memory.x(sample, position), memory.dy(sample, position)
//         rows[i], the thread's Vectors i positions further; with one position a sample, i samples
//     memory.pivot(rows, sample, position)      the thread's Vectors of x there, rows being memory.x of the same
//     memory.value(sample, position, channel)   an x of any channel of the block
#pragma once
#include "readers.cuh"

using Acc = Format<ELEMENT>::Acc;

constexpr int RUN_DEPTH = DEPTH < 3 ? DEPTH : 3;
constexpr int RUN = 1 << RUN_DEPTH; // columns of one value whose loads are under way together
constexpr bool ALIKE = TILE_ROWS > 1 && TILE_ROWS < ROWS; // columns have TILE_ROWS values, or one fewer
constexpr int PAIRS = TILE_ROWS < 2 ? 1 : 2; // rows of a column whose x and dy are; more would not fit registers

struct alignas(sizeof(ELEMENT) * VECTOR) Vectors {
    ELEMENT v[VECTOR];
};

template <class A> struct Nodes {
    Node<A> v[VECTOR];
};

// Mean and m2 of the `values` values of a column about the pivot; one value has m2 = 0, whatever it is.
template <class Acc, int LIMIT>
__device__ __forceinline__ Node<Acc> column_moments(const Acc (&v)[LIMIT], int values) {
    if (values < 2) return {v[0], Acc(0)};
    Acc sum = v[0];
#pragma unroll
    for (int r = 1; r < LIMIT; ++r)
        if (r < values) sum = add(sum, v[r]);
    const Acc mean = values == ROWS ? multiply(sum, Acc(0.125)) : divide(sum, Acc(values));
    Acc d = subtract(v[0], mean), m2 = multiply(d, d);
#pragma unroll
    for (int r = 1; r < LIMIT; ++r) {
        d = subtract(v[r], mean);
        if (r < values) m2 = add(m2, multiply(d, d));
    }
    return {mean, m2};
}

template <class Memory> struct Worker {
    using Rows = typename Memory::Rows;

    // A thread's channels in one tile.
    struct Place {
        Rows x, dy;
        long long first_bit;
        int length;
        Shape shape;
        Acc pivot[VECTOR];
    };

    const Parameters& p;
    Memory memory;
    long long channel; // the first of VECTOR
    long long end;     // one past the last tile
    long long even;    // one past the last of those that have the same number of values
    Coefficients<Acc> c[KIND::NEEDS_COEFFICIENTS ? VECTOR : 1];

    __device__ __forceinline__ Worker(const Parameters& p, const Memory& memory, long long channel, long long end)
        : p(p), memory(memory), channel(channel), end(end), even(0) {
        const long long there = p.samples << p.log2_tiles;
        if (p.log2_tiles == 0 || p.positions == TILE << p.log2_tiles) even = end < there ? end : there;
    }

    __device__ __forceinline__ long long sample_of(long long tile) const { return tile >> p.log2_tiles; }
    __device__ __forceinline__ long long position_of(long long tile) const {
        return (tile & ((1LL << p.log2_tiles) - 1)) * TILE;
    }

    // Values of one channel in a tile.
    __device__ __forceinline__ int length_of(long long tile) const {
        const long long rest = p.positions - position_of(tile);
        if (tile >= end || sample_of(tile) >= p.samples || rest <= 0) return 0;
        return rest < TILE ? static_cast<int>(rest) : TILE;
    }

    static __device__ __forceinline__ Shape shape_of_tile(int length) {
        return length == TILE ? Shape{ROWS, 0} : shape_of(length);
    }

    __device__ __forceinline__ Place place_of(long long tile) const {
        const long long sample = sample_of(tile), position = position_of(tile);
        Place at;
        at.length = length_of(tile);
        at.shape = shape_of_tile(at.length);
        at.x = memory.x(sample, position);
        if (KIND::NEEDS_COEFFICIENTS) {
            at.dy = memory.dy(sample, position);
            at.first_bit = p.bits_first + sample * p.bits_sample + position * p.bits_position + channel;
        } else if (at.length) {
            const Vectors first = memory.pivot(at.x, sample, position);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) at.pivot[i] = Format<ELEMENT>::widen(first.v[i]);
        }
        return at;
    }

    __device__ __forceinline__ unsigned bits(const Place& at, int position) const {
        if (GATE != GATE_BITS) return 0;
        return load_bits(reinterpret_cast<const unsigned char*>(p.bits), at.first_bit + position * p.bits_position, VECTOR);
    }

    // Whether a column of so many values has row r.
    static __device__ __forceinline__ bool has_row(int r, int values) {
        return (ALIKE && r < TILE_ROWS - 1) || r < values;
    }

    // A column of up to TILE_ROWS values.
    __device__ __forceinline__ Nodes<Acc> leaf(const Place& at, int column) const { return leaf(KIND{}, at, column); }

    __device__ __forceinline__ Nodes<Acc> leaf(Moments, const Place& at, int column) const {
        const int values = at.shape.values(column);
        Vectors rows[TILE_ROWS];
#pragma unroll
        for (int r = 0; r < TILE_ROWS; ++r)
            if (has_row(r, values)) rows[r] = at.x[r * COLUMNS + column];
        Nodes<Acc> n;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            Acc v[TILE_ROWS];
#pragma unroll
            for (int r = 0; r < TILE_ROWS; ++r)
                v[r] = has_row(r, values) ? subtract(Format<ELEMENT>::widen(rows[r].v[i]), at.pivot[i]) : Acc(0);
            if constexpr (ALIKE) n.v[i] = column_moments<true>(v, values == TILE_ROWS);
            else n.v[i] = column_moments(v, values);
        }
        return n;
    }

    __device__ __forceinline__ Nodes<Acc> leaf(Sums, const Place& at, int column) const {
        const int values = at.shape.values(column);
        Nodes<Acc> n{};
#pragma unroll
        for (int first = 0; first < TILE_ROWS; first += PAIRS) {
            Vectors x[PAIRS], dy[PAIRS];
            unsigned passed[PAIRS];
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) {
                if (!has_row(first + k, values)) continue;
                const int position = (first + k) * COLUMNS + column;
                x[k] = at.x[position];
                dy[k] = at.dy[position];
                passed[k] = bits(at, position);
            }
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) {
                if (!has_row(first + k, values)) continue;
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const Node<Acc> terms = terms_of<ELEMENT, GATE>(
                        Format<ELEMENT>::widen(x[k].v[i]), Format<ELEMENT>::widen(dy[k].v[i]), passed[k] >> i & 1, c[i]
                    );
                    Node<Acc>& sum = n.v[i];
                    sum = first + k == 0 ? terms : Node<Acc>{add(sum.first, terms.first), add(sum.second, terms.second)};
                }
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
    __device__ __forceinline__ Node<double> one_value(Acc x, Acc dy, bool passed, int i) const {
        return widened(column_of(KIND{}, x, dy, passed, x, i), x);
    }

    // The node of RUN neighbours of one value each, the first `values` of which are there: columns of a tile from `first`
    // on, or samples. WHOLE says that all are.
    template <bool SAMPLES, bool WHOLE> __device__ __forceinline__ auto run(const Place& at, int first, int values) const {
        Vectors x[RUN], dy[RUN];
        unsigned passed[RUN];
#pragma unroll
        for (int k = 0; k < RUN; ++k) {
            if (!WHOLE && k >= values) continue;
            x[k] = at.x[first + k];
            if (KIND::NEEDS_COEFFICIENTS) dy[k] = at.dy[first + k];
            passed[k] = bits(at, first + k);
        }
        const auto node = [&](int k, int i) {
            const Acc v = Format<ELEMENT>::widen(x[k].v[i]);
            const Acc g = KIND::NEEDS_COEFFICIENTS ? Format<ELEMENT>::widen(dy[k].v[i]) : Acc(0);
            if constexpr (SAMPLES) return one_value(v, g, passed[k] >> i & 1, i);
            else return column_of(KIND{}, v, g, passed[k] >> i & 1, at.pivot[i], i);
        };
        using N = decltype(node(0, 0));
        using A = decltype(N::first);
        A share[RUN_DEPTH + 1]; // of the right one of the two that are unequal, if any are
#pragma unroll
        for (int level = 1; level < RUN_DEPTH && !WHOLE; ++level) {
            const int both = values % (2 << level), right = both - (1 << level);
            share[level] = right > 0 ? divide(A(right), A(both)) : A(0.5);
        }
        Nodes<A> result;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            N n[RUN];
#pragma unroll
            for (int k = 0; k < RUN; ++k) n[k] = node(k, i);
#pragma unroll
            for (int level = 0; level < RUN_DEPTH; ++level)
#pragma unroll
                for (int k = 0; k < RUN; k += 2 << level) {
                    const int size = 1 << level;
                    if (!WHOLE && values <= k + size) continue;
                    const A part = WHOLE || !level || values >= k + 2 * size ? A(0.5) : share[level];
                    const A weight = WHOLE ? A(0.5 * size) : multiply(A(size), part);
                    n[k] = level ? KIND::merge(n[k], n[k + size], part, weight)
                                 : KIND::merge_values(n[k], n[k + size], part, weight);
                }
            result.v[i] = n[0];
        }
        return result;
    }

    // A tile's node in double, about 0 and not the pivot.
    static __device__ __forceinline__ Node<double> widened(Node<Acc> n, Acc pivot) {
        const double first = to_double(n.first);
        return {KIND::NEEDS_COEFFICIENTS ? first : add(to_double(pivot), first), to_double(n.second)};
    }

    __device__ __forceinline__ Node<double> merge_tiles(Node<double> a, Node<double> b, long long low, long long tiles) const {
        if (low + 2 * tiles <= even) {
            const double values = from_integer(tiles * (p.positions >> p.log2_tiles));
            return KIND::merge(a, b, 0.5, multiply(values, 0.5));
        }
        const auto values = [&](long long i) { return values_before(p, i < end ? i : end); };
        const long long before = values(low), middle = values(low + tiles), after = values(low + 2 * tiles);
        return merge_counted<KIND>(a, middle - before, b, after - middle);
    }

    // The nodes of two neighbours in a tile, of 2^level columns each.
    __device__ __forceinline__ Node<Acc> merge_in_tile(
        Node<Acc> a, Node<Acc> b, int level, long long tile, int column
    ) const {
        const int length = length_of(tile);
        return length ? merge_columns<KIND>(a, b, level, column, shape_of_tile(length), p.last) : a;
    }

    // Two neighbours of 2^level columns each, wherever: inside a tile in Acc, above in double. `g` is the channel.
    __device__ __forceinline__ Node<double> merge_shares(
        Node<double> a, Node<double> b, int level, long long tile, int column, int g
    ) const {
        if (level >= TILE_DEPTH) return merge_tiles(a, b, tile, 1LL << (level - TILE_DEPTH));
        if (length_of(tile) == 0) return a;
        const Node<Acc> left{Rounded<Acc>::from(a.first), Rounded<Acc>::from(a.second)};
        const Node<Acc> right{Rounded<Acc>::from(b.first), Rounded<Acc>::from(b.second)};
        const Node<Acc> n = merge_in_tile(left, right, level, tile, column);
        if (level + 1 < TILE_DEPTH) return {to_double(n.first), to_double(n.second)};
        return widened(n, KIND::NEEDS_COEFFICIENTS ? Acc(0) : pivot_of(tile, g));
    }

    __device__ __forceinline__ Acc pivot_of(long long tile, int g) const {
        return Format<ELEMENT>::widen(memory.value(sample_of(tile), position_of(tile), g));
    }
};

// The node of 2^LEVEL columns of a tile. Two halves one after the other: as many nodes are alive as there are levels.
template <int LEVEL> struct ColumnsOf {
    template <class W>
    static __device__ __forceinline__ Nodes<Acc> reduce(const W& w, const typename W::Place& at, int column) {
        constexpr int SIZE = 1 << (LEVEL - 1);
        Nodes<Acc> left{};
        if (at.shape.rows == 0 && at.shape.full <= column) return left;
        if constexpr (LEVEL == RUN_DEPTH && TILE_ROWS == 1)
            if (at.shape.rows == 1 || at.shape.full >= column + RUN) return w.template run<false, true>(at, column, RUN);
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
    template <class W>
    static __device__ __forceinline__ Nodes<Acc> reduce(const W& w, const typename W::Place& at, int column) {
        return w.leaf(at, column);
    }
};

// The node of 2^LEVEL columns of whole tiles.
template <int LEVEL, bool IS_TILE = LEVEL == TILE_DEPTH> struct TilesOf {
    template <class W> static __device__ __forceinline__ Nodes<double> reduce(const W& w, long long tile) {
        constexpr int TILES = 1 << (LEVEL - 1 - TILE_DEPTH);
        Nodes<double> left{};
        if constexpr (LEVEL == RUN_DEPTH && TILE_DEPTH == 0) {
            if (tile >= w.even) return left;
            if (tile + RUN <= w.even) return w.template run<true, true>(w.place_of(tile), 0, RUN);
            return w.template run<true, false>(w.place_of(tile), 0, static_cast<int>(w.even - tile));
        } else {
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
    }
};

template <int LEVEL> struct TilesOf<LEVEL, true> {
    template <class W> static __device__ __forceinline__ Nodes<double> reduce(const W& w, long long tile) {
        if (w.length_of(tile) == 0) return {};
        const auto at = w.place_of(tile);
        const Nodes<Acc> n = ColumnsOf<LEVEL>::reduce(w, at, 0);
        Nodes<double> wide;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) wide.v[i] = w.widened(n.v[i], KIND::NEEDS_COEFFICIENTS ? Acc(0) : at.pivot[i]);
        return wide;
    }
};

// What a thread makes of its columns: of whole tiles a node in double, of a part of one a node that waits for the rest.
template <bool WHOLE = (DEPTH >= TILE_DEPTH)> struct Share {
    template <class W> static __device__ __forceinline__ Nodes<double> reduce(const W& w, long long tile, int) {
        return TilesOf<DEPTH>::reduce(w, tile);
    }
};

template <> struct Share<false> {
    template <class W> static __device__ __forceinline__ Nodes<Acc> reduce(const W& w, long long tile, int column) {
        if (w.length_of(tile) == 0) return {};
        return ColumnsOf<DEPTH>::reduce(w, w.place_of(tile), column);
    }
};
