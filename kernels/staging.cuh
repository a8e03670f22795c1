// Copies from global to shared memory by a warp, several under way at a time.
#pragma once
#include "formats.cuh"

constexpr int VECTOR_BYTES = 16;

__device__ __forceinline__ int bytes_past_vector(const void* p) {
    return static_cast<int>(reinterpret_cast<unsigned long long>(p) % VECTOR_BYTES);
}

__device__ __forceinline__ bool is_vector(const void* p) { return bytes_past_vector(p) == 0; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// Copies that go past the registers: begun, put into groups, and waited for by the thread that began them.
__device__ __forceinline__ void begin_copy(uint4* to, const uint4* from) {
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const size_t global = __cvta_generic_to_global(from);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last GROUPS groups are there.
template <int GROUPS> __device__ __forceinline__ void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
#else
__device__ __forceinline__ void begin_copy(uint4* to, const uint4* from) { *to = *from; }
__device__ __forceinline__ void end_group() {}
template <int GROUPS> __device__ __forceinline__ void wait_for_groups() {}
#endif

// `length` elements by the lanes of a warp. Both begin equally far past a multiple of 16 bytes; what lies before the
// first whole vector and after the last goes element by element, so that nothing else is touched; with
// ALL_VECTORS nothing does.
template <bool ALL_VECTORS, class T>
__device__ __forceinline__ void begin_copies(T* to, const T* from, int length) {
    constexpr int ITEMS = VECTOR_BYTES / sizeof(T);
    const int lane = threadIdx.x % 32, past = ALL_VECTORS ? 0 : bytes_past_vector(from) / sizeof(T);
    int head = past ? ITEMS - past : 0;
    head = head < length ? head : length;
    const int vectors = (length - head) / ITEMS, tail = head + vectors * ITEMS;
    for (int i = lane; i < vectors; i += 32)
        begin_copy(reinterpret_cast<uint4*>(to + head) + i, reinterpret_cast<const uint4*>(from + head) + i);
    if (ALL_VECTORS) return;
    const int rest = lane < head ? lane : tail + lane - head; // fewer than 32 elements in all
    if (rest < length) to[rest] = from[rest];
}
