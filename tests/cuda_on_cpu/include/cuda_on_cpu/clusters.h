// Clusters and cooperative grids: the host's side of the few operations a kernel writes in PTX on the device.
#pragma once
#include "cuda_on_cpu/synchronization.h"

inline unsigned cluster_rank() { return cuda_on_cpu::current->block->cluster_rank; }
inline unsigned cluster_size() { return cuda_on_cpu::current->block->cluster_size; }

// Barriers of all threads of the cluster, and of the whole grid of a cooperative launch.
inline void cluster_sync(CUDA_ON_CPU_PLACE) { cuda_on_cpu::cluster_barrier(place); }
inline void grid_sync(CUDA_ON_CPU_PLACE) { cuda_on_cpu::grid_barrier(place); }

// The same shared variable in the cluster's block `rank` (distributed shared memory).
template <class T> T* cluster_map(T* pointer, unsigned rank, CUDA_ON_CPU_PLACE) {
    return static_cast<T*>(cuda_on_cpu::cluster_address(pointer, rank, place));
}
