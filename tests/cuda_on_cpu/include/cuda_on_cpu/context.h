// What a compiled kernel and the runtime library know of each other: which CUDA thread runs, and where its block is.
#pragma once
#include "cuda_on_cpu/vector_types.h"

#pragma GCC visibility push(default)

namespace cuda_on_cpu {

// A line of the kernel's source; as a default argument, the line of the call.
struct Place {
    const char* file = nullptr;
    int line = 0;
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct BlockContext {
    uint3 index{};
    dim3 dimensions, grid;
    unsigned cluster_rank = 0, cluster_size = 1;
    char* static_shared = nullptr;
    char* dynamic_shared = nullptr;
};

struct ThreadContext {
    uint3 index{};
    unsigned rank = 0;  // in its block, x fastest
    BlockContext* block = nullptr;
};

// The CUDA thread this OS thread is running.
extern __thread ThreadContext* current __attribute__((tls_model("initial-exec")));

// Barriers: each returns when every thread it names has come.
void block_barrier(Place place);
unsigned block_count(bool predicate, Place place);
void warp_barrier(unsigned mask, Place place);
unsigned warp_ballot(unsigned mask, bool predicate, Place place);
unsigned long long warp_shuffle(unsigned mask, unsigned long long bits, unsigned source_lane, Place place);
void cluster_barrier(Place place);
void grid_barrier(Place place);

// The address in the cluster's block `rank` of the shared variable that lies at `address` in this block.
void* cluster_address(const void* address, unsigned rank, Place place);

[[noreturn]] void trap(Place place);

// Orders this thread's memory accesses for all threads.
void fence();

// Lets other OS threads go on: what this thread waits for is up to their blocks.
void pause(Place place);

// Around each atomic where ThreadSanitizer watches.
void before_atomic(void* address);
void after_atomic(void* address);

}  // namespace cuda_on_cpu

#pragma GCC visibility pop
