// Runs the threads of a gang on the calling OS thread, each until it must wait.
#pragma once
#include <stdexcept>
#include <string>

#include "block.h"

namespace cuda_on_cpu {

struct LaunchFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Runs a started gang to its end; throws LaunchFailure, after which the gang cannot be used again.
void run(Gang& gang);

// The body of a thread's fiber.
void run_thread();

// Ends the launch from within a thread.
[[noreturn]] void fail(Thread& thread, const char* reason, Place place);

bool same(Place a, Place b);

// "block (1,0,0): 32 at __syncthreads (kernel.cu:12), 32 exited"
std::string describe(const Block& block);

}  // namespace cuda_on_cpu
