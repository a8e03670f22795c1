// Integer atomics, relaxed as on the device: another thread's other writes are seen only across fences.
#pragma once
#include "cuda_on_cpu/bits.h"
#include "cuda_on_cpu/context.h"

namespace cuda_on_cpu {

template <class T> constexpr bool is_atomic = false;
template <> constexpr bool is_atomic<int> = true;
template <> constexpr bool is_atomic<unsigned> = true;
template <> constexpr bool is_atomic<long long> = true;
template <> constexpr bool is_atomic<unsigned long long> = true;

template <class T, class Update> T read_modify_write(T* address, Update update) {
    static_assert(is_atomic<T>, "atomics are for 32- and 64-bit integers");
#if defined(__SANITIZE_THREAD__)
    before_atomic(address);
#endif
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(address, &old, update(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
#if defined(__SANITIZE_THREAD__)
    after_atomic(address);
#endif
    return old;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(name, result)                                                  \
    template <class T> T name(T* address, cuda_on_cpu::exactly<T> value) {                \
        return cuda_on_cpu::read_modify_write(address, [value](T old) -> T { return result; }); \
    }

CUDA_ON_CPU_ATOMIC(atomicAdd, cuda_on_cpu::Bits<T>(old) + cuda_on_cpu::Bits<T>(value))
CUDA_ON_CPU_ATOMIC(atomicSub, cuda_on_cpu::Bits<T>(old) - cuda_on_cpu::Bits<T>(value))
CUDA_ON_CPU_ATOMIC(atomicExch, value)
CUDA_ON_CPU_ATOMIC(atomicMin, old < value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicMax, old > value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicAnd, old& value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDA_ON_CPU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUDA_ON_CPU_ATOMIC

template <class T> T atomicCAS(T* address, cuda_on_cpu::exactly<T> expected, cuda_on_cpu::exactly<T> value) {
    return cuda_on_cpu::read_modify_write(address, [=](T old) -> T { return old == expected ? value : old; });
}
