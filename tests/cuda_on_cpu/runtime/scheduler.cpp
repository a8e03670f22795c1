#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "barriers.h"
#include "sanitizers.h"

namespace cuda_on_cpu {

__thread ThreadContext* current = nullptr;

namespace {

bool any(const Block& block, State state) {
    return std::any_of(block.threads.begin(), block.threads.end(), [&](const Thread& t) { return t.state == state; });
}

std::string text(uint3 index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

void run_warp(Block& block, unsigned warp) {
    Thread* lanes = &block.threads[32 * warp];
    const unsigned count = block.lane_count(warp);
    do {
        for (unsigned lane : block.gang.order.lanes()) {
            if (lane >= count || lanes[lane].state != State::ready) continue;
            current = &lanes[lane];
            lanes[lane].fiber.resume();
            if (lanes[lane].state != State::failed) continue;
            const std::string where = ", thread " + text(lanes[lane].index) + ", in " + describe(block);
            throw LaunchFailure(lanes[lane].failure + where);
        }
    } while (release_warp(block, warp));
}

// Runs a block until it exits or all its threads wait for other blocks.
void run_block(Block& block) {
    do {
        for (unsigned warp : block.gang.order.warps()) run_warp(block, warp);
    } while (release_block(block));
    if (any(block, State::at_warp) || any(block, State::at_block)) {
        throw LaunchFailure("barrier divergence in " + describe(block));
    }
    const auto exited = [](const Thread& thread) { return thread.state == State::exited; };
    block.exited = std::all_of(block.threads.begin(), block.threads.end(), exited);
    if (block.exited) {
        acquire(&block.end_token);
        if (block.cluster_size > 1) block.memory.retire();
    }
}

// Releases what waits for other blocks.
void release_gang(Gang& gang) {
    bool released = release_grid(gang);
    const unsigned cluster = gang.launch->cluster;
    for (unsigned first = 0; first < gang.blocks.size(); first += cluster) released |= release_cluster(gang, first);
    if (released) return;
    std::string message = "barrier divergence between blocks";
    const char* separator = ": ";
    for (std::size_t i = 0; i < std::min<std::size_t>(gang.blocks.size(), 8); ++i) {
        message += separator + describe(*gang.blocks[i]);
        separator = "; ";
    }
    throw LaunchFailure(message);
}

const char* name(State state) {
    switch (state) {
        case State::ready: return "running";
        case State::at_warp: return "at a warp barrier";
        case State::at_block: return "at __syncthreads";
        case State::at_cluster: return "at cluster_sync";
        case State::at_grid: return "at grid_sync";
        case State::exited: return "exited";
        case State::failed: return "stopped";
    }
    return "";
}

}  // namespace

void run(Gang& gang) {
    for (;;) {
        bool waiting = false;
        for (unsigned i : gang.order.blocks()) {
            Block& block = *gang.blocks[i];
            if (!block.exited) run_block(block);
            waiting |= !block.exited;
        }
        if (!waiting) return;
        release_gang(gang);
    }
}

void run_thread() {
    Fiber::enter();
    Thread& thread = static_cast<Thread&>(*current);
    Block& block = static_cast<Block&>(*thread.block);
    const Launch& launch = *block.gang.launch;
    acquire(&block.start_token);
    launch.kernel.call(launch.arguments);
    release(&block.end_token);
    thread.state = State::exited;
    thread.fiber.suspend();
    __builtin_trap();
}

void fail(Thread& thread, const char* reason, Place place) {
    thread.place = place;
    thread.failure = reason;
    thread.state = State::failed;
    thread.fiber.suspend();
    __builtin_trap();
}

bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }

std::string describe(const Block& block) {
    std::map<std::string, unsigned> counts;
    for (const Thread& thread : block.threads) {
        std::string what = name(thread.state);
        const bool placed = thread.state != State::ready && thread.state != State::exited;
        if (placed) what += std::string(" (") + thread.place.file + ":" + std::to_string(thread.place.line) + ")";
        ++counts[what];
    }
    std::string description = "block " + text(block.index);
    const char* separator = ": ";
    for (const auto& [what, count] : counts) {
        description += separator + std::to_string(count) + (count == 1 ? " thread " : " threads ") + what;
        separator = ", ";
    }
    return description;
}

}  // namespace cuda_on_cpu
