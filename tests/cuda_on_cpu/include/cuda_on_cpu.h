// Everything a CUDA C++ kernel may use on the CPU. No header of CUDA's or of C++'s is included, as under NVRTC.
#pragma once
#include "cuda_on_cpu/vector_types.h"
#include "cuda_on_cpu/context.h"
#include "cuda_on_cpu/qualifiers.h"
#include "cuda_on_cpu/shared.h"
#include "cuda_on_cpu/synchronization.h"
#include "cuda_on_cpu/clusters.h"
#include "cuda_on_cpu/atomics.h"
#include "cuda_on_cpu/memory.h"
#include "cuda_on_cpu/integers.h"
#include "cuda_on_cpu/arithmetic.h"
#include "cuda_on_cpu/kernel.h"
