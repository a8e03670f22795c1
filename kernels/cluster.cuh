// Blocks that run at the same time and read one another's shared memory. -DCLUSTER=<1..8>: how many; 1 is a block by
// itself, on any device, more need compute capability 9.0.
#pragma once

#ifdef __CUDA_ARCH__
// Which of the cluster's blocks this is. Of blockIdx.x % CLUSTER the compiler makes loops of more instructions.
__device__ __forceinline__ unsigned cluster_rank() {
#if CLUSTER == 1
    return 0;
#else
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#endif
}
#endif

#if CLUSTER == 1
#define CLUSTERED
#else
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)

#ifdef __CUDA_ARCH__
// A barrier of all threads of the cluster: what they wrote before it is seen after it.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Where block `rank` of the cluster has what this one has at `pointer` in shared memory.
template <class T> __device__ __forceinline__ const T* cluster_map(const T* pointer, unsigned rank) {
    unsigned long long mapped;
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
    return reinterpret_cast<const T*>(mapped);
}
#endif
#endif
