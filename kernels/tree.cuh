// Nodes of the canonical tree and their merges: moments by Chan's formula, sums by plain additions.
#pragma once
#include "formats.cuh"
#include "parameters.cuh"

constexpr int ROWS = 8;
constexpr int COLUMNS = 256;
constexpr int TILE = ROWS * COLUMNS;

// (mean, m2), or the sums (of dy, of dy * (x - mean)).
template <class Acc> struct Node {
    Acc first, second;
};

template <class Acc> EXACT Node<Acc> add(Node<Acc> a, Node<Acc> b) {
    return {add(a.first, b.first), add(a.second, b.second)};
}
template <class Acc> EXACT Node<Acc> add_where(bool wanted, Node<Acc> a, Node<Acc> b) {
    return {add_where(wanted, a.first, b.first), add_where(wanted, a.second, b.second)};
}

struct Moments {
    static constexpr bool NEEDS_COEFFICIENTS = false;
    // share = count_b / count, weight = count_a * share
    template <class Acc> static EXACT Node<Acc> merge(Node<Acc> a, Node<Acc> b, Acc share, Acc weight) {
        const Acc d = subtract(b.first, a.first);
        return {add(a.first, multiply(d, share)), add(add(a.second, b.second), multiply(multiply(d, d), weight))};
    }
    // The same of two single values, whose m2 is 0.
    template <class Acc> static EXACT Node<Acc> merge_values(Node<Acc> a, Node<Acc> b, Acc share, Acc weight) {
        const Acc d = subtract(b.first, a.first);
        return {add(a.first, multiply(d, share)), multiply(multiply(d, d), weight)};
    }
};

struct Sums {
    static constexpr bool NEEDS_COEFFICIENTS = true;
    template <class Acc> static EXACT Node<Acc> merge(Node<Acc> a, Node<Acc> b, Acc, Acc) {
        return add(a, b);
    }
    template <class Acc> static EXACT Node<Acc> merge_values(Node<Acc> a, Node<Acc> b, Acc share, Acc weight) {
        return merge(a, b, share, weight);
    }
};

// The share and the weight of a merge.
template <class Acc> struct Ratio {
    Acc share, weight;
};

// That of the one merge of a level of the last tile whose sides are unequal.
template <class Acc> EXACT Ratio<Acc> unequal(const LastTile& last, int level) {
    return {Rounded<Acc>::of_bits(last.share[level]), Rounded<Acc>::of_bits(last.weight[level])};
}

// Any two nodes; one without values is the identity.
template <class Kind, class Acc>
__device__ __forceinline__ Node<Acc> merge_counted(Node<Acc> a, long long count_a, Node<Acc> b, long long count_b) {
    if (count_b == 0) return a;
    if (count_a == 0) return b;
    Acc share, values_a, values_b, values;
    from_integer(count_a, values_a);
    if (count_a == count_b) {
        share = Acc(0.5);
    } else {
        from_integer(count_b, values_b);
        from_integer(count_a + count_b, values);
        share = divide(values_b, values);
    }
    return Kind::merge(a, b, share, multiply(values_a, share));
}

// A node of a row, and how many values it has.
struct CountedNode {
    Node<double> node;
    long long count;
};

template <class Kind> __device__ __forceinline__ CountedNode merge_counted(const CountedNode& a, const CountedNode& b) {
    return {merge_counted<Kind>(a.node, a.count, b.node, b.count), a.count + b.count};
}

// Values of one channel before padded tile i, counted from the first sample's first on.
__device__ __forceinline__ long long values_before(const Parameters& p, long long i) {
    const long long sample = i >> p.log2_tiles;
    if (sample >= p.samples) return p.samples * p.positions;
    const long long inside = (i - (sample << p.log2_tiles)) * TILE;
    return sample * p.positions + (inside < p.positions ? inside : p.positions);
}

__device__ __forceinline__ long long values_between(const Parameters& p, long long low, long long high) {
    return values_before(p, high) - values_before(p, low);
}
