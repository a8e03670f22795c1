// CUDA's qualifiers and the built-in variables.
#pragma once
#include "cuda_on_cpu/context.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __forceinline__ inline  // each function once: nearly all of the tests' time is g++'s
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition) ((void)0)

#define threadIdx (::cuda_on_cpu::current->index)
#define blockIdx (::cuda_on_cpu::current->block->index)
#define blockDim (::cuda_on_cpu::current->block->dimensions)
#define gridDim (::cuda_on_cpu::current->block->grid)
#define warpSize 32

using size_t = decltype(sizeof 0);
