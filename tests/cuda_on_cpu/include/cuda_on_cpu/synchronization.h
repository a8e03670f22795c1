// Barriers, fences, votes and shuffles. Their last parameter is the caller's line, for messages.
#pragma once
#include "cuda_on_cpu/bits.h"
#include "cuda_on_cpu/context.h"

#define CUDA_ON_CPU_PLACE ::cuda_on_cpu::Place place = ::cuda_on_cpu::Place::here()

inline void __syncthreads(CUDA_ON_CPU_PLACE) { cuda_on_cpu::block_barrier(place); }
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_PLACE) {
    return cuda_on_cpu::block_count(predicate != 0, place);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_PLACE) {
    return cuda_on_cpu::block_count(predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_PLACE) {
    return cuda_on_cpu::block_count(predicate == 0, place) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_PLACE) { cuda_on_cpu::warp_barrier(mask, place); }

inline void __threadfence_block() { cuda_on_cpu::fence(); }
inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_system() { cuda_on_cpu::fence(); }

inline void __nanosleep(unsigned, CUDA_ON_CPU_PLACE) { cuda_on_cpu::pause(place); }

[[noreturn]] inline void __trap(CUDA_ON_CPU_PLACE) { cuda_on_cpu::trap(place); }

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
    return cuda_on_cpu::warp_ballot(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
    return cuda_on_cpu::warp_ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
    return cuda_on_cpu::warp_ballot(mask, predicate == 0, place) == 0;
}

namespace cuda_on_cpu {

inline unsigned lane() { return current->rank % 32; }

template <class T> T shuffle(unsigned mask, T value, unsigned source_lane, Place place) {
    return bit_cast<T>(static_cast<Bits<T>>(warp_shuffle(mask, bit_cast<Bits<T>>(value), source_lane, place)));
}

}  // namespace cuda_on_cpu

// A source outside the caller's section of `width` lanes is the caller itself.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_PLACE) {
    const unsigned lane = cuda_on_cpu::lane();
    return cuda_on_cpu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), place);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_CPU_PLACE) {
    const unsigned lane = cuda_on_cpu::lane(), source = lane ^ lane_mask, end = (lane & ~(width - 1)) + width;
    return cuda_on_cpu::shuffle(mask, value, source < end ? source : lane, place);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_PLACE) {
    const unsigned lane = cuda_on_cpu::lane();
    const bool inside = (lane & (width - 1)) + delta < unsigned(width);
    return cuda_on_cpu::shuffle(mask, value, inside ? lane + delta : lane, place);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_PLACE) {
    const unsigned lane = cuda_on_cpu::lane();
    return cuda_on_cpu::shuffle(mask, value, (lane & (width - 1)) >= delta ? lane - delta : lane, place);
}
