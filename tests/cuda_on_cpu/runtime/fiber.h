// A fiber: a stack on which one CUDA thread runs until it must wait.
#pragma once
#include <cstddef>

#include "sanitizers.h"

namespace cuda_on_cpu {

class Fiber {
public:
    static constexpr std::size_t stack_bytes = 128 << 10;

    Fiber() = default;
    Fiber(const Fiber&) = delete;
    ~Fiber();

    // The next resume() begins `body`, which must end with suspend(). `stagger` keeps the hot ends of the stacks of
    // neighbouring fibers out of one another's cache sets.
    void prepare(char* stack, void (*body)(), unsigned stagger);
    void resume();
    void suspend();

    // To be called by an OS thread before it resumes fibers.
    static void adopt_os_thread();
    static SwitchHooks& os_thread_hooks();
    // To be called first in `body`.
    static void enter();

private:
    void* stack_pointer_ = nullptr;
    bool created_ = false;
    SwitchHooks hooks_;
};

// Anonymous memory: pages that are never touched cost nothing.
class Pages {
public:
    explicit Pages(std::size_t bytes);
    Pages(const Pages&) = delete;
    ~Pages();
    char* begin() const { return begin_; }
    std::size_t size() const { return bytes_; }

private:
    char* begin_;
    std::size_t bytes_;
};

}  // namespace cuda_on_cpu
