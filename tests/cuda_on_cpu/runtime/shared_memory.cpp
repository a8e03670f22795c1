#include "shared_memory.h"

#include <cstring>

#include "sanitizers.h"

namespace cuda_on_cpu {

void SharedMemory::prepare(const SharedLayout& layout, std::size_t dynamic_bytes) {
    dynamic_offset_ = layout.span;
    used_ = layout.span + dynamic_bytes;
    unpoison(pages_.begin(), pages_.size());
    std::memset(pages_.begin(), 0xff, used_);
    poison(pages_.begin(), pages_.size());
    for (unsigned i = 0; i < layout.count; ++i) {
        unpoison(static_begin() + layout.variables[i].offset, layout.variables[i].bytes);
    }
    unpoison(dynamic_begin(), dynamic_bytes);
}

void SharedMemory::retire() {
    unpoison(pages_.begin(), pages_.size());
    std::memset(pages_.begin(), 0xff, used_);
    poison(pages_.begin(), pages_.size());
}

bool SharedMemory::contains(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return byte >= pages_.begin() && byte < pages_.begin() + used_;
}

}  // namespace cuda_on_cpu
