// One tile of a sample by WIDTH neighbouring lanes of a warp: a lane owns 8 neighbouring columns of up to 8 rows; or, if
// WIDTH is 1, all of a tile of one row.
//
// A reader knows where the tile's values are:
//     reader.is_aligned()                    whether its octets begin at multiples of 16 bytes
//     reader.read<WHOLE>(position, valid, terms)
//         the terms of positions [position, position + min(valid, 8)) of the tile; WHOLE: 8 are valid, and aligned
// with terms.v[j] = x for moments; for sums the pair of dy behind its gate and dy * (x - mean).
#pragma once
#include "parameters.cuh"
#include "tree.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;

// How many values the columns of a tile have: those before `full` rows + 1, the others rows.
struct Shape {
    int rows, full;
    __device__ __forceinline__ int values(int column) const { return rows + (column < full); }
};

__device__ __forceinline__ Shape shape_of(long long length) {
    const int values = static_cast<int>(length);
    return {values / COLUMNS, values % COLUMNS};
}

// The merge of the nodes of columns [low, low + size) and [low + size, low + 2 size).
template <class Kind, class Acc>
__device__ __forceinline__ Node<Acc> merge_columns(
    Node<Acc> a, Node<Acc> b, int level, int low, Shape shape, const LastTile& last
) {
    const int size = 1 << level;
    const bool uniform = shape.full <= low || shape.full >= low + 2 * size;
    if (!uniform) {
        if (shape.rows == 0 && shape.full <= low + size) return a; // b has no values
        return Kind::merge(a, b, Rounded<Acc>::from(last.share[level]), Rounded<Acc>::from(last.weight[level]));
    }
    if (shape.rows == 0 && shape.full <= low) return a; // neither has
    return Kind::merge(a, b, Acc(0.5), multiply(Acc(size * shape.values(low)), Acc(0.5)));
}

// The same in a tile of one row, which has `left` values from column `low` on: nothing to branch on, for the lanes of a
// warp are at different columns.
template <class Kind, class Acc>
__device__ __forceinline__ Node<Acc> merge_row(Node<Acc> a, Node<Acc> b, int level, int left, const LastTile& last) {
    const int size = 1 << level;
    const bool whole = level == 0 || left >= 2 * size; // two values, or a alone
    const Acc share = whole ? Acc(0.5) : Rounded<Acc>::from(last.share[level]);
    const Acc weight = whole ? Acc(0.5 * size) : Rounded<Acc>::from(last.weight[level]);
    const Node<Acc> n = level ? Kind::merge(a, b, share, weight) : Kind::merge_values(a, b, share, weight);
    const bool alone = left <= size; // b has no values
    return {alone ? a.first : n.first, alone ? a.second : n.second};
}

template <class Acc> __device__ __forceinline__ Node<Acc> shuffle_node(Node<Acc> n, int offset) {
    return {__shfl_xor_sync(ALL_LANES, n.first, offset), __shfl_xor_sync(ALL_LANES, n.second, offset)};
}

constexpr int OCTET_LEVELS = 3; // of the tree over the 8 columns of an octet

// Merge the 8 columns from `column` on, by merge(a, b, level, low).
template <class Acc, class Merge>
__device__ __forceinline__ Node<Acc> merge_octet(Node<Acc> (&n)[OCTET], int column, const Merge& merge) {
#pragma unroll
    for (int level = 0; level < OCTET_LEVELS; ++level) {
        const int size = 1 << level;
#pragma unroll
        for (int j = 0; j < OCTET; j += 2 * size) n[j] = merge(n[j], n[j + size], level, column + j);
    }
    return n[0];
}

// Merge the 8 columns of every lane, then the lanes; every lane ends with the tile's node.
template <int WIDTH, class Acc, class Merge>
__device__ __forceinline__ Node<Acc> merge_all(Node<Acc> (&n)[OCTET], const Merge& merge) {
    const int lane = threadIdx.x % WIDTH, column = OCTET * lane;
    Node<Acc> node = merge_octet(n, column, merge);
#pragma unroll
    for (int level = OCTET_LEVELS; (OCTET * WIDTH) >> (level + 1); ++level) {
        const int offset = 1 << (level - OCTET_LEVELS);
        const Node<Acc> other = shuffle_node(node, offset);
        const bool right = lane & offset;
        const int low = column & ~(2 * (1 << level) - 1);
        node = merge(right ? other : node, right ? node : other, level, low);
    }
    return node;
}

template <class Acc> struct MomentTerms {
    Acc v[OCTET];
};

template <class Acc> struct SumTerms {
    Node<Acc> v[OCTET];
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

// A tile of `length` values, in up to ROW_LIMIT rows; WHOLE says that all are there, and aligned.
template <class Kind, int WIDTH, int ROW_LIMIT, bool WHOLE> struct Tile {
    const LastTile& last;
    int length, column; // the lane's first

    __device__ __forceinline__ Tile(int length, const LastTile& last)
        : last(last), length(length), column(OCTET * (threadIdx.x % WIDTH)) {}

    __device__ __forceinline__ Shape shape() const {
        return WHOLE || length == TILE ? Shape{ROWS, 0} : shape_of(length);
    }
    template <class Reader, class Terms>
    __device__ __forceinline__ void read(const Reader& reader, int r, Terms& terms) const {
        reader.template read<WHOLE>(r * COLUMNS + column, length - r * COLUMNS - column, terms);
    }
    template <class Acc> __device__ __forceinline__ Node<Acc> merged(Node<Acc> (&n)[OCTET], Shape shape) const {
        return merge_all<WIDTH>(n, [&](Node<Acc> a, Node<Acc> b, int level, int low) {
            if (ROW_LIMIT == 1) return merge_row<Kind>(a, b, level, length - low, last);
            return merge_columns<Kind>(a, b, level, low, shape, last);
        });
    }

    template <class Acc, class Reader> __device__ __forceinline__ Node<double> reduce(Moments, const Reader& reader) const {
        MomentTerms<Acc> rows[ROW_LIMIT];
#pragma unroll
        for (int r = 0; r < ROW_LIMIT; ++r) read(reader, r, rows[r]);
        const Acc pivot = __shfl_sync(ALL_LANES, rows[0].v[0], 0, WIDTH);
        const Shape s = shape();
        Node<Acc> n[OCTET];
#pragma unroll
        for (int j = 0; j < OCTET; ++j) {
            Acc v[ROW_LIMIT];
#pragma unroll
            for (int r = 0; r < ROW_LIMIT; ++r) v[r] = subtract(rows[r].v[j], pivot);
            if (ROW_LIMIT == 1) n[j] = {v[0], Acc(0)};
            else n[j] = column_moments(v, s.values(column + j));
        }
        const Node<Acc> node = merged(n, s);
        return {add(to_double(pivot), to_double(node.first)), to_double(node.second)};
    }

    template <class Acc, class Reader> __device__ __forceinline__ Node<double> reduce(Sums, const Reader& reader) const {
        Node<Acc> n[OCTET] = {};
#pragma unroll 4 // all of them on their way would not fit the registers
        for (int r = 0; r < ROW_LIMIT; ++r) {
            SumTerms<Acc> row;
            read(reader, r, row);
#pragma unroll
            for (int j = 0; j < OCTET; ++j)
                if (WHOLE || j < length - r * COLUMNS - column)
                    n[j] = {add(n[j].first, row.v[j].first), add(n[j].second, row.v[j].second)};
        }
        const Node<Acc> node = merged(n, shape());
        return {to_double(node.first), to_double(node.second)};
    }
};

// A tile of one row by one thread, its octets from left to right.
template <class Kind> struct Row {
    static constexpr int TOP = LEVELS - OCTET_LEVELS;
    const LastTile& last;
    int length;

    // Add a node of 8 << I columns to those that wait for a right neighbour, one for each bit of `octets`.
    template <int I, class Acc>
    static __device__ __forceinline__ void push(Node<Acc> node, int octets, Node<Acc> (&waiting)[TOP + 1]) {
        if constexpr (I < TOP)
            if (octets >> I & 1) {
                node = Kind::merge(waiting[I], node, Acc(0.5), Acc(0.5 * (OCTET << I)));
                return push<I + 1>(node, octets, waiting);
            }
        waiting[I] = node;
    }

    // read(position, valid, columns)
    template <class Acc, class Read> __device__ __forceinline__ Node<Acc> merged(const Read& read) const {
        const auto octet = [&](int position, int valid) {
            Node<Acc> n[OCTET];
            read(position, valid, n);
            return merge_octet(n, 0, [&](Node<Acc> a, Node<Acc> b, int level, int low) {
                return merge_row<Kind>(a, b, level, valid - low, last);
            });
        };
        Node<Acc> waiting[TOP + 1] = {};
        int octets = 0;
#pragma unroll 1
        for (; octets < length / OCTET; ++octets) push<0>(octet(octets * OCTET, OCTET), octets, waiting);
        const int rest = length % OCTET;
        bool any = rest > 0; // right of those that wait: fewer columns than theirs
        Node<Acc> node = any ? octet(octets * OCTET, rest) : waiting[TOP];
#pragma unroll
        for (int i = 0; i < TOP; ++i) {
            if (!(octets >> i & 1)) continue;
            const Acc share = Rounded<Acc>::from(last.share[OCTET_LEVELS + i]);
            const Acc weight = Rounded<Acc>::from(last.weight[OCTET_LEVELS + i]);
            node = any ? Kind::merge(waiting[i], node, share, weight) : waiting[i];
            any = true;
        }
        return node;
    }

    template <class Acc, class Reader> __device__ __forceinline__ Node<double> reduce(Moments, const Reader& reader) const {
        MomentTerms<Acc> terms;
        reader.template read<false>(0, length > 0, terms);
        const Acc pivot = terms.v[0];
        const Node<Acc> node = merged<Acc>([&](int position, int valid, Node<Acc> (&n)[OCTET]) {
            reader.template read<false>(position, valid, terms);
#pragma unroll
            for (int j = 0; j < OCTET; ++j) n[j] = {subtract(terms.v[j], pivot), Acc(0)};
        });
        return {add(to_double(pivot), to_double(node.first)), to_double(node.second)};
    }

    template <class Acc, class Reader> __device__ __forceinline__ Node<double> reduce(Sums, const Reader& reader) const {
        const Node<Acc> node = merged<Acc>([&](int position, int valid, Node<Acc> (&n)[OCTET]) {
            SumTerms<Acc> terms;
            reader.template read<false>(position, valid, terms);
#pragma unroll
            for (int j = 0; j < OCTET; ++j) n[j] = terms.v[j];
        });
        return {to_double(node.first), to_double(node.second)};
    }
};

// The node of a tile of `length` values. ROW_LIMIT is 1 where tiles have at most 256 values, else 8, and WIDTH 32.
template <class Kind, int WIDTH, int ROW_LIMIT, class Acc, class Reader>
__device__ __forceinline__ Node<double> reduce_tile(const Reader& reader, int length, const LastTile& last) {
    if constexpr (WIDTH == 1) {
        return Row<Kind>{last, length}.template reduce<Acc>(Kind{}, reader);
    } else {
        if (ROW_LIMIT == ROWS && length == TILE && reader.is_aligned())
            return Tile<Kind, WIDTH, ROW_LIMIT, true>(TILE, last).template reduce<Acc>(Kind{}, reader);
        return Tile<Kind, WIDTH, ROW_LIMIT, false>(length, last).template reduce<Acc>(Kind{}, reader);
    }
}
