// Shared memory: `__shared__` declarations are rewritten (by runner.py) into uses of these.
#pragma once
#include "cuda_on_cpu/context.h"

namespace cuda_on_cpu {

// Where a module's static shared variables lie in a block's shared memory, each between two redzones.
struct SharedLayout {
    static constexpr unsigned alignment = 128, redzone = 128, capacity = 64;
    struct Variable { unsigned long offset, bytes; };
    unsigned long span = redzone, bytes = 0;  // with redzones and without
    unsigned count = 0;
    Variable variables[capacity]{};

    unsigned long reserve(unsigned long size) {
        if (count == capacity) __builtin_trap();
        const unsigned long offset = span;
        variables[count++] = {offset, size};
        span += (size + alignment - 1) / alignment * alignment + redzone;
        bytes += size;
        return offset;
    }
};

inline SharedLayout shared_layout;

// `Tag` is another type at every declaration and in every instantiation of a template.
template <class T, class Tag> struct StaticShared { static const unsigned long offset; };
template <class T, class Tag> const unsigned long StaticShared<T, Tag>::offset = shared_layout.reserve(sizeof(T));

template <class T, class Tag> T& static_shared(Tag) {
    return *reinterpret_cast<T*>(current->block->static_shared + StaticShared<T, Tag>::offset);
}

template <class T> T* dynamic_shared() { return reinterpret_cast<T*>(current->block->dynamic_shared); }

}  // namespace cuda_on_cpu
