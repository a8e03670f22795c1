// The state of threads, blocks and of the blocks that run together.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "cuda_on_cpu/context.h"
#include "cuda_on_cpu/kernel.h"
#include "fiber.h"
#include "memory_order.h"
#include "order.h"
#include "shared_memory.h"

namespace cuda_on_cpu {

enum class State { ready, at_warp, at_block, at_cluster, at_grid, exited, failed };

enum class WarpOperation { barrier, ballot, shuffle };

struct Thread : ThreadContext {
    Fiber fiber;
    MemoryOrder memory_order;
    State state = State::exited;
    Place place;  // where it waits
    const char* failure = nullptr;
    unsigned pauses = 0;

    // Of the barrier it waits at: what it brings and what it takes away.
    WarpOperation operation = WarpOperation::barrier;
    unsigned mask = 0, source_lane = 0;
    std::uint64_t value = 0, result = 0;
};

// A barrier's turns, for ThreadSanitizer: a turn's token orders what came before it and what comes after. Two tokens
// suffice, as nobody begins the turn after next before all have left this one.
class Turns {
public:
    void* token() { return &tokens_[completed_ % 2]; }
    void complete() { ++completed_; }

private:
    unsigned completed_ = 0;
    char tokens_[2] = {};
};

struct Gang;

struct Block : BlockContext {
    Block(Gang& gang, unsigned position, unsigned thread_count);

    Gang& gang;
    const unsigned position;  // in the gang
    std::vector<Thread> threads;
    SharedMemory memory;
    bool exited = false;

    unsigned warp_count() const { return (threads.size() + 31) / 32; }
    unsigned lane_count(unsigned warp) const { return std::min<unsigned>(threads.size() - 32 * warp, 32); }
    Block& of_cluster(unsigned rank) const;

    Turns turns, cluster_turns;
    std::vector<std::map<unsigned, Turns>> warp_turns;  // by warp and mask
    char start_token = 0, end_token = 0;

private:
    Pages stacks_;

    friend struct Gang;
};

// Blocks that run together on one OS thread, in turns: a cluster, or the whole grid of a cooperative launch.
struct Gang {
    Gang(unsigned block_count, unsigned thread_count);

    std::uint64_t thread_count() const { return blocks.size() * blocks[0]->threads.size(); }

    // Makes the blocks from grid position `first` on ready to run.
    void start(const struct Launch& launch, std::uint64_t first);

    const struct Launch* launch = nullptr;
    std::vector<std::unique_ptr<Block>> blocks;
    Order order;
    Turns grid_turns;
};

struct Launch {
    const Kernel& kernel;
    void* const* arguments;
    dim3 grid, block;
    unsigned cluster;
    bool cooperative;
    std::uint64_t dynamic_bytes;
    std::uint64_t order;

    std::uint64_t block_count() const { return std::uint64_t{grid.x} * grid.y * grid.z; }
    std::uint64_t gang_size() const { return cooperative ? block_count() : cluster; }
};

}  // namespace cuda_on_cpu
