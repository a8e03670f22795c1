// A block's shared memory: the static variables and the dynamic array, each between redzones.
#pragma once
#include <cstddef>

#include "cuda_on_cpu/shared.h"
#include "fiber.h"

namespace cuda_on_cpu {

class SharedMemory {
public:
    // The largest a device has: static variables, and static and dynamic together.
    static constexpr std::size_t static_limit = 48 << 10, limit = 227 << 10;

    // Memory for a new block: NaN everywhere, so that what is read before it is written shows.
    void prepare(const SharedLayout& layout, std::size_t dynamic_bytes);
    // The block has exited: nothing of it may be read any more.
    void retire();

    char* static_begin() const { return pages_.begin(); }
    char* dynamic_begin() const { return pages_.begin() + dynamic_offset_; }
    bool contains(const void* address) const;

private:
    Pages pages_{limit + 3 * SharedLayout::capacity * SharedLayout::redzone};
    std::size_t dynamic_offset_ = 0, used_ = 0;
};

}  // namespace cuda_on_cpu
