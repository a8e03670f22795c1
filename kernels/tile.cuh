// Tiles of a sample of neighbouring positions: one of several rows by a warp, whose lanes own 8 neighbouring columns
// each; one of a row by some of its lanes, or one, that own 8 or more.
//
// A reader knows where the tile's values are:
//     reader.is_aligned()                    whether its octets are whole, and begin at multiples of 16 bytes
//     reader.read<WHOLE>(position, valid, terms)
//         the terms of positions [position, position + min(valid, 8)) of the tile; WHOLE: 8 are valid, and aligned
// with terms.v[j] = x for moments; for sums the pair of dy behind its gate and dy * (x - mean).
#pragma once
#include "parameters.cuh"
#include "tree.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

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
        const Ratio<Acc> ratio = unequal<Acc>(last, level);
        return Kind::merge(a, b, ratio.share, ratio.weight);
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
    const Ratio<Acc> ratio = unequal<Acc>(last, level);
    const Acc share = whole ? Acc(0.5) : ratio.share;
    const Acc weight = !whole ? ratio.weight : level ? Acc(size / 2) : Acc(0.5);
    const Node<Acc> n = level ? Kind::merge(a, b, share, weight) : Kind::merge_values(a, b, share, weight);
    const bool alone = left <= size; // b has no values
    return {alone ? a.first : n.first, alone ? a.second : n.second};
}

template <class Acc> __device__ __forceinline__ Node<Acc> shuffle_node(Node<Acc> n, int offset) {
    return {__shfl_xor_sync(ALL_LANES, n.first, offset), __shfl_xor_sync(ALL_LANES, n.second, offset)};
}

constexpr int OCTET_LEVELS = 3; // of the tree over the 8 columns of an octet

// A level of the tree that is known to the compiler.
template <int LEVEL> struct Level {
    __device__ __forceinline__ constexpr operator int() const { return LEVEL; }
};

// Merge the 8 columns from `column` on, by merge(a, b, level, low).
template <int LEVEL = 0, class Acc, class Merge>
__device__ __forceinline__ Node<Acc> merge_octet(Node<Acc> (&n)[OCTET], int column, const Merge& merge) {
    constexpr int SIZE = 1 << LEVEL;
#pragma unroll
    for (int j = 0; j < OCTET; j += 2 * SIZE) n[j] = merge(n[j], n[j + SIZE], Level<LEVEL>{}, column + j);
    if constexpr (LEVEL + 1 < OCTET_LEVELS) merge_octet<LEVEL + 1>(n, column, merge);
    return n[0];
}

// The node of the lane that is `offset` lanes to the right, of `width` lanes.
template <class Acc> __device__ __forceinline__ Node<Acc> node_to_the_right(Node<Acc> n, int offset, int width) {
    return {__shfl_down_sync(ALL_LANES, n.first, offset, width), __shfl_down_sync(ALL_LANES, n.second, offset, width)};
}

// Merge the nodes of the octets of a warp's lanes, in the same way; the first lane ends with the root, the others with
// what nobody asks for.
template <int LEVEL = OCTET_LEVELS, class Acc, class Merge>
__device__ __forceinline__ Node<Acc> merge_warp(Node<Acc> n, int column, const Merge& merge) {
    n = merge(n, node_to_the_right(n, 1 << (LEVEL - OCTET_LEVELS), WARP), Level<LEVEL>{}, column);
    if constexpr (LEVEL + 1 < LEVELS) return merge_warp<LEVEL + 1>(n, column, merge);
    return n;
}

template <class Acc> struct MomentTerms {
    Acc v[OCTET];
};

template <class Acc> struct SumTerms {
    Node<Acc> v[OCTET];
};

template <class Acc> EXACT Acc square(Acc a) { return multiply(a, a); }

// a / LIMIT where `all`, else a / (LIMIT - 1).
template <int LIMIT, class Acc> EXACT Acc divide_by_rows(Acc a, bool all) {
    constexpr Acc of_all = Acc(1) / Acc(LIMIT), of_fewer = Acc(1) / Acc(LIMIT - 1);
    const Acc count = all ? Acc(LIMIT) : Acc(LIMIT - 1), reciprocal = all ? of_all : of_fewer;
    if (LIMIT == 2) return multiply(a, reciprocal);
    if (LIMIT == 6 || LIMIT == 7) return divide(a, count); // by 6 a `quotient` could be another
    return quotient(a, count, reciprocal);
}

// Mean and m2 about the pivot of a column of LIMIT values, the last of which is there where `all` are: everywhere,
// unless the tile is MIXED.
template <bool MIXED, class Acc, int LIMIT> EXACT Node<Acc> column_moments(const Acc (&v)[LIMIT], bool all) {
    constexpr int LAST = LIMIT - 1;
    Acc sum = v[0];
#pragma unroll
    for (int r = 1; r < LAST; ++r) sum = add(sum, v[r]);
    const Acc mean = MIXED ? divide_by_rows<LIMIT>(add_where(all, sum, v[LAST]), all)
                           : multiply(add(sum, v[LAST]), Acc(1) / Acc(LIMIT));
    Acc m2 = square(subtract(v[0], mean));
#pragma unroll
    for (int r = 1; r < LAST; ++r) m2 = add(m2, square(subtract(v[r], mean)));
    if (LAST == 1 && !all) m2 = Acc(0); // one value has m2 = 0, whatever it is
    const Acc of_last = square(subtract(v[LAST], mean));
    return {mean, MIXED ? add_where(all, m2, of_last) : add(m2, of_last)};
}

// Where a tile of LIMIT rows ends: nowhere before a whole tile does, between octets, or anywhere in its last row.
enum class End { NONE, AT_OCTET, ANYWHERE };

// A tile of two rows and more by a warp; its octets are aligned unless it ends anywhere.
template <class Kind, int LIMIT, End END> struct Tile {
    static_assert(LIMIT > 1 && (END != End::NONE || LIMIT == ROWS), "one row is a Row's");
    static constexpr int LAST = LIMIT - 1;
    const LastTile& last;
    int column; // the lane's first
    int full;   // columns before this one have LIMIT values, the others LAST

    __device__ __forceinline__ Tile(int length, const LastTile& last)
        : last(last), column(OCTET * (threadIdx.x % WARP)), full(length - LAST * COLUMNS) {}

    // Whether the lane's column j has LIMIT values.
    __device__ __forceinline__ bool has_all(int j) const {
        return END == End::NONE || column + (END == End::ANYWHERE ? j : 0) < full;
    }

    template <class Reader, class Terms>
    __device__ __forceinline__ void read(const Reader& reader, int r, Terms& terms) const {
        const int position = r * COLUMNS + column;
        if (END == End::ANYWHERE) reader.template read<false>(position, r < LAST ? OCTET : full - column, terms);
        else if (r < LAST || has_all(0)) reader.template read<true>(position, OCTET, terms);
    }

    // The merge of the columns from `low` on and their right neighbours, 2^LEVEL each.
    template <int LEVEL, class Acc>
    __device__ __forceinline__ Node<Acc> operator()(Node<Acc> a, Node<Acc> b, Level<LEVEL>, int low) const {
        constexpr int SIZE = 1 << LEVEL;
        constexpr bool ONE_OCTET = LEVEL < OCTET_LEVELS && END == End::AT_OCTET;
        constexpr Acc of_all = Acc(LIMIT * SIZE) / 2, of_fewer = Acc(LAST * SIZE) / 2;
        const bool all = ONE_OCTET ? has_all(0) : END == End::NONE || low + 2 * SIZE <= full;
        const Acc weight = all ? of_all : of_fewer;
        if (ONE_OCTET || END == End::NONE) return Kind::merge(a, b, Acc(0.5), weight);
        const bool uniform = all || full <= low;
        const Ratio<Acc> ratio = unequal<Acc>(last, LEVEL);
        return Kind::merge(a, b, uniform ? Acc(0.5) : ratio.share, uniform ? weight : ratio.weight);
    }

    template <class Acc> __device__ __forceinline__ Node<Acc> merged(Node<Acc> (&n)[OCTET]) const {
        return merge_warp(merge_octet(n, column, *this), column, *this);
    }

    template <class Acc, class Reader> __device__ __forceinline__ Node<double> reduce(Moments, const Reader& reader) const {
        MomentTerms<Acc> rows[LIMIT] = {};
#pragma unroll
        for (int r = 0; r < LIMIT; ++r) read(reader, r, rows[r]);
        const Acc pivot = __shfl_sync(ALL_LANES, rows[0].v[0], 0);
        Node<Acc> n[OCTET];
#pragma unroll
        for (int j = 0; j < OCTET; ++j) {
            Acc v[LIMIT];
#pragma unroll
            for (int r = 0; r < LIMIT; ++r) v[r] = subtract(rows[r].v[j], pivot);
            n[j] = column_moments<END != End::NONE>(v, has_all(j));
        }
        const Node<Acc> node = merged(n);
        return {add(to_double(pivot), to_double(node.first)), to_double(node.second)};
    }

    template <class Acc, class Reader> __device__ __forceinline__ Node<double> reduce(Sums, const Reader& reader) const {
        SumTerms<Acc> row;
        read(reader, 0, row);
        Node<Acc> n[OCTET];
#pragma unroll
        for (int j = 0; j < OCTET; ++j) n[j] = row.v[j];
#pragma unroll (LIMIT > 5 ? 4 : LIMIT) // all of them on their way would not fit the registers
        for (int r = 1; r < LIMIT; ++r) {
            read(reader, r, row);
#pragma unroll
            for (int j = 0; j < OCTET; ++j)
                n[j] = r < LAST || END == End::NONE ? add(n[j], row.v[j]) : add_where(has_all(j), n[j], row.v[j]);
        }
        const Node<Acc> node = merged(n);
        return {to_double(node.first), to_double(node.second)};
    }
};

// A tile of one row by WIDTH lanes, or one: each has 2^level columns, three levels or more, and goes through its octets
// from left to right.
template <class Kind, int WIDTH> struct Row {
    static constexpr int TOP = LEVELS - OCTET_LEVELS;
    const LastTile& last;
    int length, level;

    __device__ __forceinline__ Row(int length, const LastTile& last) : last(last), length(length), level(OCTET_LEVELS) {
        while (WIDTH > 1 && WIDTH << level < length) ++level;
    }

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

    // Of the `valid` columns from `first` on; read(position, valid, columns).
    template <class Acc, class Read>
    __device__ __forceinline__ Node<Acc> of_lane(int first, int valid, const Read& read) const {
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
        for (; octets < valid / OCTET; ++octets) push<0>(octet(first + octets * OCTET, OCTET), octets, waiting);
        const int rest = valid % OCTET;
        bool any = rest > 0; // right of those that wait: fewer columns than theirs
        Node<Acc> node = any ? octet(first + octets * OCTET, rest) : waiting[TOP];
#pragma unroll
        for (int i = 0; i < TOP; ++i) {
            if (!(octets >> i & 1)) continue;
            const Ratio<Acc> ratio = unequal<Acc>(last, OCTET_LEVELS + i);
            node = any ? Kind::merge(waiting[i], node, ratio.share, ratio.weight) : waiting[i];
            any = true;
        }
        return node;
    }

    template <class Acc, class Read> __device__ __forceinline__ Node<Acc> merged(const Read& read) const {
        if (WIDTH == 1) return of_lane<Acc>(0, length, read);
        const int columns = 1 << level, first = static_cast<int>(threadIdx.x % WIDTH) << level, left = length - first;
        Node<Acc> node = of_lane<Acc>(first, left < 0 ? 0 : left < columns ? left : columns, read);
#pragma unroll
        for (int offset = 1, i = level; offset < WIDTH; offset *= 2, ++i)
            node = merge_row<Kind>(node, node_to_the_right(node, offset, WIDTH), i, left, last);
        return node; // in the first lane
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

// The node of a tile of `length` values, a whole one or a sample's last: in ROW_LIMIT rows, 0 if that is whole as well.
// IS_TALL: whether there are whole ones.
template <class Kind, int WIDTH, int ROW_LIMIT, bool IS_TALL, class Acc, class Reader>
__device__ __forceinline__ Node<double> reduce_tile(const Reader& reader, int length, const LastTile& last) {
    if constexpr (IS_TALL)
        if (ROW_LIMIT == 0 || length == TILE) {
            if (reader.is_aligned()) return Tile<Kind, ROWS, End::NONE>(TILE, last).template reduce<Acc>(Kind{}, reader);
            return Tile<Kind, ROWS, End::ANYWHERE>(TILE, last).template reduce<Acc>(Kind{}, reader);
        }
    if constexpr (ROW_LIMIT == 1) {
        return Row<Kind, WIDTH>(length, last).template reduce<Acc>(Kind{}, reader);
    } else if constexpr (ROW_LIMIT) {
        if (reader.is_aligned())
            return Tile<Kind, ROW_LIMIT, End::AT_OCTET>(length, last).template reduce<Acc>(Kind{}, reader);
        return Tile<Kind, ROW_LIMIT, End::ANYWHERE>(length, last).template reduce<Acc>(Kind{}, reader);
    }
}
