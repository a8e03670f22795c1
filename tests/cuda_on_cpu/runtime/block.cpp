#include "block.h"

#include "scheduler.h"

namespace cuda_on_cpu {

Block::Block(Gang& gang, unsigned position, unsigned thread_count)
    : gang(gang),
      position(position),
      threads(thread_count),
      warp_turns(warp_count()),
      stacks_(thread_count * Fiber::stack_bytes) {}

Block& Block::of_cluster(unsigned rank) const { return *gang.blocks[position - cluster_rank + rank]; }

Gang::Gang(unsigned block_count, unsigned thread_count) {
    for (unsigned i = 0; i < block_count; ++i) blocks.push_back(std::make_unique<Block>(*this, i, thread_count));
}

void Gang::start(const Launch& new_launch, std::uint64_t first) {
    launch = &new_launch;
    order.start(new_launch.order, first, blocks[0]->warp_count(), blocks.size());
    for (auto& block : blocks) {
        const std::uint64_t index = first + block->position;
        const dim3 grid = new_launch.grid, size = new_launch.block;
        block->index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
        block->dimensions = size;
        block->grid = grid;
        block->cluster_size = new_launch.cluster;
        block->cluster_rank = index % new_launch.cluster;
        block->memory.prepare(*new_launch.kernel.shared, new_launch.dynamic_bytes);
        block->static_shared = block->memory.static_begin();
        block->dynamic_shared = block->memory.dynamic_begin();
        block->exited = false;
        uint3 thread_index{};
        for (unsigned rank = 0; rank < block->threads.size(); ++rank) {
            Thread& thread = block->threads[rank];
            thread.index = thread_index;
            thread.rank = rank;
            thread.block = block.get();
            thread.state = State::ready;
            thread.pauses = 0;
            thread.memory_order.restart();
            thread.fiber.prepare(block->stacks_.begin() + rank * Fiber::stack_bytes, run_thread, rank);
            if (++thread_index.x == size.x) thread_index.x = 0, ++thread_index.y;
            if (thread_index.y == size.y) thread_index.y = 0, ++thread_index.z;
        }
        release(&block->start_token);
    }
}

}  // namespace cuda_on_cpu
