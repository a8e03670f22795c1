// Releases threads from the barriers at which all that belong there have come.
#pragma once
#include "block.h"

namespace cuda_on_cpu {

// Each says whether it released any thread.
bool release_warp(Block& block, unsigned warp);
bool release_block(Block& block);
bool release_cluster(Gang& gang, unsigned first_block);
bool release_grid(Gang& gang);

}  // namespace cuda_on_cpu
