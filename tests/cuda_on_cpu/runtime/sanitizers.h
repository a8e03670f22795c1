// What the sanitizers must be told: which memory is out of bounds, which stack runs, and which writes are ordered.
// The runtime itself is compiled without instrumentation. Each function does nothing without its sanitizer.
#pragma once
#include <cstddef>

#if defined(CUDA_ON_CPU_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_ON_CPU_THREAD)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
}
#endif

namespace cuda_on_cpu {

#if defined(CUDA_ON_CPU_THREAD)
constexpr bool thread_sanitizer = true;
// What a thread did before `release(token)` happens before what another does after `acquire(token)`.
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }
#else
constexpr bool thread_sanitizer = false;
inline void release(void*) {}
inline void acquire(void*) {}
#endif

#if defined(CUDA_ON_CPU_ADDRESS)
inline void poison(void* begin, std::size_t bytes) { __asan_poison_memory_region(begin, bytes); }
inline void unpoison(void* begin, std::size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
#else
inline void poison(void*, std::size_t) {}
inline void unpoison(void*, std::size_t) {}
#endif

// One side of a switch between stacks: a fiber's, or the OS thread's own.
class SwitchHooks {
public:
#if defined(CUDA_ON_CPU_THREAD)
    void adopt_current() { fiber_ = __tsan_get_current_fiber(); }
    void create_fiber() { fiber_ = __tsan_create_fiber(0); }
    void destroy_fiber() { __tsan_destroy_fiber(fiber_); }
    // Flag 1: the switch itself orders nothing, so that races between CUDA threads stay visible.
    void before_switch_to(SwitchHooks& other) { __tsan_switch_to_fiber(other.fiber_, 1); }
    void after_switch_back() {}
    void first_entry(SwitchHooks&) {}
    void set_stack(const void*, std::size_t) {}

private:
    void* fiber_ = nullptr;
#elif defined(CUDA_ON_CPU_ADDRESS)
    void adopt_current() {}
    void create_fiber() {}
    void destroy_fiber() {}
    void before_switch_to(SwitchHooks& other) {
        __sanitizer_start_switch_fiber(&fake_stack_, other.stack_, other.stack_bytes_);
    }
    void after_switch_back() { __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr); }
    void first_entry(SwitchHooks& from) { __sanitizer_finish_switch_fiber(nullptr, &from.stack_, &from.stack_bytes_); }
    void set_stack(const void* bottom, std::size_t bytes) { stack_ = bottom, stack_bytes_ = bytes; }

private:
    void* fake_stack_ = nullptr;
    const void* stack_ = nullptr;
    std::size_t stack_bytes_ = 0;
#else
    void adopt_current() {}
    void create_fiber() {}
    void destroy_fiber() {}
    void before_switch_to(SwitchHooks&) {}
    void after_switch_back() {}
    void first_entry(SwitchHooks&) {}
    void set_stack(const void*, std::size_t) {}
#endif
};

}  // namespace cuda_on_cpu
