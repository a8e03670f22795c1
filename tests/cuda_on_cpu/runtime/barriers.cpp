#include "barriers.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "sanitizers.h"
#include "scheduler.h"

namespace cuda_on_cpu {

namespace {

Thread& self() { return static_cast<Thread&>(*current); }
Block& block_of(Thread& thread) { return static_cast<Block&>(*thread.block); }

void wait(Thread& thread, State state, Place place, void* token) {
    thread.place = place;
    thread.state = state;
    release(token);
    thread.fiber.suspend();
    acquire(token);
}

std::uint64_t wait_at_warp(
    unsigned mask, WarpOperation operation, std::uint64_t value, unsigned source_lane, Place place) {
    Thread& thread = self();
    if (!(mask >> thread.rank % 32 & 1)) fail(thread, "a lane that is not in its own mask", place);
    thread.operation = operation;
    thread.mask = mask;
    thread.value = value;
    thread.source_lane = source_lane;
    void* token = thread_sanitizer ? block_of(thread).warp_turns[thread.rank / 32][mask].token() : nullptr;
    wait(thread, State::at_warp, place, token);
    return thread.result;
}

// What each lane of a complete group takes away. A lane outside the group gives what is undefined on a device: ones.
void exchange(Thread* lanes, unsigned group) {
    std::uint64_t ballot = 0;
    for (unsigned rest = group; rest; rest &= rest - 1) {
        const unsigned lane = __builtin_ctz(rest);
        if (lanes[lane].value) ballot |= 1u << lane;
    }
    for (unsigned rest = group; rest; rest &= rest - 1) {
        Thread& thread = lanes[__builtin_ctz(rest)];
        if (thread.operation == WarpOperation::ballot) thread.result = ballot;
        if (thread.operation == WarpOperation::shuffle) {
            thread.result = group >> thread.source_lane & 1 ? lanes[thread.source_lane].value : ~std::uint64_t{0};
        }
    }
}

}  // namespace

void block_barrier(Place place) { block_count(false, place); }

unsigned block_count(bool predicate, Place place) {
    Thread& thread = self();
    thread.value = predicate;
    wait(thread, State::at_block, place, block_of(thread).turns.token());
    return thread.result;
}

void warp_barrier(unsigned mask, Place place) { wait_at_warp(mask, WarpOperation::barrier, 0, 0, place); }

unsigned warp_ballot(unsigned mask, bool predicate, Place place) {
    return wait_at_warp(mask, WarpOperation::ballot, predicate, 0, place);
}

unsigned long long warp_shuffle(unsigned mask, unsigned long long bits, unsigned source_lane, Place place) {
    return wait_at_warp(mask, WarpOperation::shuffle, bits, source_lane, place);
}

void cluster_barrier(Place place) {
    Thread& thread = self();
    wait(thread, State::at_cluster, place, block_of(thread).of_cluster(0).cluster_turns.token());
}

void grid_barrier(Place place) {
    Thread& thread = self();
    Gang& gang = block_of(thread).gang;
    if (!gang.launch->cooperative) fail(thread, "grid_sync in a launch that is not cooperative", place);
    wait(thread, State::at_grid, place, gang.grid_turns.token());
}

void* cluster_address(const void* address, unsigned rank, Place place) {
    Thread& thread = self();
    Block& block = block_of(thread);
    if (rank >= block.cluster_size) fail(thread, "cluster_map of a rank outside the cluster", place);
    if (!block.memory.contains(address)) fail(thread, "cluster_map of an address outside shared memory", place);
    Block& peer = block.of_cluster(rank);
    if (peer.exited) fail(thread, "cluster_map of a block that has exited", place);
    return peer.static_shared + (static_cast<const char*>(address) - block.static_shared);
}

void pause(Place place) {
    constexpr unsigned most = 1 << 19;  // of a thread: more than half a minute
    if (++self().pauses > most) fail(self(), "a wait for other blocks that does not end", place);
    std::this_thread::sleep_for(std::chrono::microseconds(50));
}

void trap(Place place) { fail(self(), "__trap", place); }

void fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (thread_sanitizer) self().memory_order.fence();
}

void before_atomic(void* address) { self().memory_order.before_atomic(address); }
void after_atomic(void* address) { self().memory_order.after_atomic(address); }

bool release_warp(Block& block, unsigned warp) {
    Thread* lanes = &block.threads[32 * warp];
    const unsigned lane_count = block.lane_count(warp), present = lane_count == 32 ? ~0u : (1u << lane_count) - 1;
    bool released = false;
    for (unsigned lane = 0; lane < lane_count; ++lane) {
        const Thread& first = lanes[lane];
        if (first.state != State::at_warp) continue;
        const unsigned group = first.mask & present;
        bool complete = true;
        for (unsigned rest = group; rest && complete; rest &= rest - 1) {
            const Thread& other = lanes[__builtin_ctz(rest)];
            complete = other.state == State::at_warp && other.mask == first.mask && other.operation == first.operation;
        }
        if (!complete) continue;
        exchange(lanes, group);
        for (unsigned rest = group; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].state = State::ready;
        if (thread_sanitizer) block.warp_turns[warp][first.mask].complete();
        released = true;
    }
    return released;
}

bool release_block(Block& block) {
    auto& threads = block.threads;
    std::uint64_t count = 0;
    for (const Thread& thread : threads) {
        if (thread.state != State::at_block) return false;
        count += thread.value;
    }
    const auto elsewhere = [&](const Thread& thread) { return !same(thread.place, threads[0].place); };
    if (std::any_of(threads.begin(), threads.end(), elsewhere)) {
        throw LaunchFailure("__syncthreads at different places in " + describe(block));
    }
    for (Thread& thread : threads) {
        thread.result = count;
        thread.state = State::ready;
    }
    block.turns.complete();
    return true;
}

namespace {
bool release_blocks(Gang& gang, unsigned first, unsigned end, State state, Turns& turns) {
    for (unsigned i = first; i < end; ++i) {
        for (const Thread& thread : gang.blocks[i]->threads) {
            if (thread.state != state) return false;
        }
    }
    for (unsigned i = first; i < end; ++i) {
        for (Thread& thread : gang.blocks[i]->threads) thread.state = State::ready;
    }
    turns.complete();
    return true;
}
}  // namespace

bool release_cluster(Gang& gang, unsigned first_block) {
    Block& first = *gang.blocks[first_block];
    return release_blocks(gang, first_block, first_block + first.cluster_size, State::at_cluster, first.cluster_turns);
}

bool release_grid(Gang& gang) { return release_blocks(gang, 0, gang.blocks.size(), State::at_grid, gang.grid_turns); }

}  // namespace cuda_on_cpu
