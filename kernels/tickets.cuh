// A training step or gradient of channels that fit the second-level cache: reduced, and applied while they are there.
//
// The channels are cut into groups, a group into `rows` pieces of one span of tiles each. Blocks take tickets from a
// counter; each says to reduce a piece, or to apply one. The piece that is applied is `ahead` pieces behind the one that
// is reduced at the same time: so many are in the cache. The last block to reduce a piece of a group merges the nodes of
// all, in the order of the tree whoever that is, and says what follows; who applies a piece waits for it.
//
// Nobody waits for ever: a block waits only for work of smaller tickets, and these are held by blocks that run, in the
// order of the numbers. So neither the order in which blocks start matters, nor how many run at a time.
//
// p.tickets: the next ticket; then for each group how many of its pieces are reduced, and 1 once they are merged. It is
// of zeros when the launch begins. -DTHREADS, and what elementwise.cuh asks for.
#pragma once
#include "resident.cuh"

struct Turn {
    unsigned piece;
    bool applies;
};

// A ticket's: first `ahead` pieces are reduced, then one is reduced and one applied in turn, then the last are applied.
__device__ __forceinline__ Turn turn_of(unsigned ticket, unsigned pieces, unsigned ahead) {
    if (ticket < ahead) return {ticket, false};
    if (ticket >= 2 * pieces - ahead) return {ticket - pieces, true};
    const unsigned applied = (ticket - ahead) / 2;
    return (ticket - ahead) % 2 ? Turn{applied, true} : Turn{applied + ahead, false};
}

__device__ __forceinline__ unsigned* counter_of(const Parameters& p, long long group) {
    return reinterpret_cast<unsigned*>(p.tickets) + 1 + group;
}

__device__ __forceinline__ unsigned take_ticket(const Parameters& p) { return atomicAdd(counter_of(p, -1), 1u); }

// Count one more of a group; what the block wrote is seen by whoever sees that. How many they were before, in thread 0.
__device__ __forceinline__ unsigned count_up(const Parameters& p, long long group) {
    __syncthreads();
    if (threadIdx.x) return 0;
    __threadfence();
    const unsigned before = atomicAdd(counter_of(p, group), 1u);
    __threadfence();
    return before;
}

// Wait until a group is merged: what was written before is seen.
__device__ __forceinline__ void wait_for(const Parameters& p, long long group) {
    if (threadIdx.x == 0) {
        while (atomicAdd(counter_of(p, group), 0u) <= p.rows) __nanosleep(100);
        __threadfence();
    }
    __syncthreads();
}

// All nodes of a group into one for each channel, `at_once` channels at a time, and what follows from it.
template <class Acc>
__device__ __forceinline__ void finish_group(const Parameters& p, const Span& s, Node<double>* nodes) {
    const int rows = static_cast<int>(p.rows), channels = static_cast<int>(p.at_once);
    int padded = 1;
    while (padded < rows) padded *= 2; // nodes of no values are never looked at
#pragma unroll 1
    for (int g0 = 0; g0 < s.group; g0 += channels) {
        const long long c0 = s.first_channel + g0;
        for (int k = threadIdx.x; k < rows * channels; k += THREADS) {
            const int row = k / channels, g = k % channels;
            const long long at = row * p.channels + c0 + g;
            if (c0 + g < p.channels)
                nodes[g * padded + row] = {reinterpret_cast<const double*>(p.node_first)[at],
                                           reinterpret_cast<const double*>(p.node_second)[at]};
        }
        merge_span<KIND>(p, {padded, channels, c0, 0, 0}, nodes, p.span);
        for (int g = threadIdx.x; g < channels && c0 + g < p.channels; g += THREADS) {
            const long long c = c0 + g;
            Coefficients<Acc> k = KIND::NEEDS_COEFFICIENTS ? load_coefficients<Acc>(p, c) : known_coefficients<Acc>(p, c);
            Channel channel{};
            channel.load(p, c, true);
            channel.finish(p, nodes[g * padded], k);
            store_coefficients(p, c, k);
            channel.store(p);
        }
        __syncthreads();
    }
}

// Work until no ticket is left. reduce(span, nodes) leaves the roots of a span's channels in shared memory and returns
// how far they are from one another; apply(span) may look at the coefficients.
template <class Acc, class Reduce, class Apply>
__device__ __forceinline__ void take_turns(
    const Parameters& p, Node<double>* nodes, const Reduce& reduce, const Apply& apply
) {
    __shared__ unsigned shared_ticket;
    __shared__ unsigned reduced;
    const unsigned pieces = static_cast<unsigned>(p.pieces), rows = static_cast<unsigned>(p.rows);
    unsigned next = threadIdx.x == 0 ? take_ticket(p) : 0;
    for (;;) {
        if (threadIdx.x == 0) shared_ticket = next;
        __syncthreads();
        const unsigned ticket = shared_ticket;
        if (ticket >= 2 * pieces) return; // all threads do
        if (threadIdx.x == 0) next = take_ticket(p); // it comes while this one's work is done
        const Turn turn = turn_of(ticket, pieces, static_cast<unsigned>(p.ahead));
        const long long group = turn.piece / rows, row = turn.piece % rows;
        const Span s{static_cast<int>(p.span), static_cast<int>(p.group), group * p.group, row, row * p.span};
        if (turn.applies) {
            wait_for(p, group);
            apply(s);
        } else {
            store_nodes(p, s, nodes, reduce(s, nodes));
            const unsigned before = count_up(p, group);
            if (threadIdx.x == 0) reduced = before + 1;
            __syncthreads();
            if (reduced == rows) {
                finish_group<Acc>(p, s, nodes);
                count_up(p, group);
            }
        }
        __syncthreads();
    }
}
