// The description of a module's kernel that the runtime launches it by.
#pragma once
#include "cuda_on_cpu/shared.h"

namespace cuda_on_cpu {

struct Kernel {
    void (*call)(void* const* arguments);  // as one CUDA thread
    const SharedLayout* shared;
    const unsigned long* argument_sizes;
    unsigned argument_count;
};

template <unsigned... i> struct Indices {};

template <auto kernel> struct KernelOf;
template <class... A, void (*kernel)(A...)> struct KernelOf<kernel> {
    static constexpr unsigned long sizes[] = {sizeof(A)..., 0};

    template <unsigned... i> static void apply(void* const* arguments, Indices<i...>) {
        kernel(*static_cast<const A*>(arguments[i])...);
    }
    static void call(void* const* arguments) { apply(arguments, Indices<__integer_pack(sizeof...(A))...>()); }

    static constexpr Kernel description() { return {call, &shared_layout, sizes, sizeof...(A)}; }
};

}  // namespace cuda_on_cpu

// Ends a module's source.
#define CUDA_ON_CPU_KERNEL(name)                                                \
    extern "C" __attribute__((visibility("default"))) const cuda_on_cpu::Kernel cuda_on_cpu_kernel = \
        cuda_on_cpu::KernelOf<name>::description();
