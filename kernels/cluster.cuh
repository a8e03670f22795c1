// Blocks that run at the same time, CLUSTER of them, and read one another's shared memory. -DCLUSTER=<1..8>; 1 is a block
// by itself, on any device; more need compute capability 9.0.
#pragma once

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#ifdef __CUDA_ARCH__
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier of all threads of the cluster; what they wrote before it is seen after it.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Where the block `rank` has what this block has at `pointer`, in shared memory.
template <class T> __device__ __forceinline__ const T* cluster_map(const T* pointer, unsigned rank) {
    unsigned long long mapped;
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
    return reinterpret_cast<const T*>(mapped);
}
#endif
#else
#define CLUSTERED
#endif
