// The one function the Python side calls: checks a launch as a driver does, and runs its gangs on OS threads.
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "sanitizers.h"
#include "scheduler.h"

namespace cuda_on_cpu {

namespace {

// As runner.py lays it out.
struct Request {
    std::uint32_t grid[3], block[3], cluster, cooperative, workers, padding;
    std::uint64_t dynamic_bytes, order;
};

dim3 extents(const std::uint32_t (&xyz)[3]) { return {xyz[0], xyz[1], xyz[2]}; }

void check(const Launch& launch) {
    const dim3 grid = launch.grid, block = launch.block;
    const auto refuse_if = [](bool bad, const char* what) {
        if (bad) throw LaunchFailure(std::string("invalid configuration: ") + what);
    };
    refuse_if(!grid.x || !grid.y || !grid.z, "the grid is empty");
    refuse_if(!block.x || !block.y || !block.z, "the block is empty");
    refuse_if(grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff, "the grid is too large");
    refuse_if(block.z > 64 || std::uint64_t{block.x} * block.y > 1024, "the block is too large");
    refuse_if(block.x * block.y * block.z > 1024, "the block is too large");
    refuse_if(!launch.cluster || launch.cluster > 8, "a cluster has 1 to 8 blocks");
    refuse_if(grid.x % launch.cluster, "the grid is no multiple of the cluster");
    const std::uint64_t static_bytes = launch.kernel.shared->bytes;
    refuse_if(static_bytes > SharedMemory::static_limit, "too much static shared memory");
    refuse_if(launch.dynamic_bytes > SharedMemory::limit - static_bytes, "too much shared memory");
}

// Gangs between launches, as stacks are slow to make.
class IdleGangs {
public:
    std::unique_ptr<Gang> take(std::uint64_t blocks, unsigned threads) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto fits = [&](const auto& gang) {
            return gang->blocks.size() == blocks && gang->blocks[0]->threads.size() == threads;
        };
        const auto found = std::find_if(gangs_.begin(), gangs_.end(), fits);
        if (found == gangs_.end()) return std::make_unique<Gang>(blocks, threads);
        std::unique_ptr<Gang> gang = std::move(*found);
        gangs_.erase(found);
        fibers_ -= gang->thread_count();
        return gang;
    }

    void give_back(std::unique_ptr<Gang> gang) {
        const std::lock_guard<std::mutex> lock(mutex_);
        fibers_ += gang->thread_count();
        gangs_.push_back(std::move(gang));
        for (; fibers_ > fiber_limit; gangs_.pop_front()) fibers_ -= gangs_.front()->thread_count();
    }

private:
    static constexpr std::uint64_t fiber_limit = thread_sanitizer ? 2048 : 8192;  // ThreadSanitizer has 8128 in all
    std::mutex mutex_;
    std::deque<std::unique_ptr<Gang>> gangs_;
    std::uint64_t fibers_ = 0;
};

IdleGangs& idle_gangs() {
    static IdleGangs& idle = *new IdleGangs;  // never destroyed: other threads may still run when the process ends
    return idle;
}

// A failure stops a launch. Turns before it are still taken: what a launch reports is the failure of its earliest
// turn, however its workers ran.
class Outcome {
public:
    void fail(std::uint64_t turn, const char* message) {
        const std::lock_guard lock(mutex_);
        if (turn >= failed_turn_) return;
        failed_turn_ = turn;
        message_ = message;
    }
    bool failed() const { return failed_turn_ != none; }
    bool wants(std::uint64_t turn) const { return turn < failed_turn_.load(std::memory_order_relaxed); }
    const std::string& message() const { return message_; }

private:
    static constexpr std::uint64_t none = -1;
    std::mutex mutex_;
    std::atomic<std::uint64_t> failed_turn_{none};
    std::string message_;
};

// Runs every `workers`-th gang of the grid, in `gang`. The division is fixed and workers share no lock, so that only
// the kernel orders neighbouring blocks: ThreadSanitizer sees races between them.
void work(const Launch& launch, unsigned worker, unsigned workers, Gang& gang, Outcome& outcome) {
    const unsigned control = _mm_getcsr();
    _mm_setcsr(0x1f80);  // round to nearest, keep subnormals, whatever the caller's thread does
    std::uint64_t turn = worker;
    try {
        Fiber::adopt_os_thread();
        const std::uint64_t size = launch.gang_size(), count = launch.block_count() / size;
        for (; turn < count && outcome.wants(turn); turn += workers) {
            gang.start(launch, gang_at(turn, count, launch.order) * size);
            run(gang);
        }
    } catch (const std::exception& error) {
        outcome.fail(turn, error.what());
    }
    _mm_setcsr(control);
}

void run_grid(const Launch& launch, unsigned workers, Outcome& outcome) {
    workers = std::min<std::uint64_t>(workers, launch.block_count() / launch.gang_size());
    std::vector<std::unique_ptr<Gang>> gangs;
    for (unsigned i = 0; i < workers; ++i) {
        gangs.push_back(idle_gangs().take(launch.gang_size(), launch.block.x * launch.block.y * launch.block.z));
    }
    std::vector<std::thread> others;
    for (unsigned i = 1; i < workers; ++i) {
        others.emplace_back(work, std::cref(launch), i, workers, std::ref(*gangs[i]), std::ref(outcome));
    }
    work(launch, 0, workers, *gangs[0], outcome);
    for (auto& other : others) other.join();
    if (outcome.failed()) return;  // in the middle of their threads, gangs cannot be used again
    for (auto& gang : gangs) idle_gangs().give_back(std::move(gang));
}

// Copies of the arguments at addresses aligned for any type.
class ArgumentCopies {
public:
    ArgumentCopies(const Kernel& kernel, const void* const* arguments) {
        for (unsigned i = 0; i < kernel.argument_count; ++i) {
            const std::size_t bytes = kernel.argument_sizes[i];
            copies_.push_back(std::aligned_alloc(128, (bytes + 127) / 128 * 128));
            std::memcpy(copies_.back(), arguments[i], bytes);
        }
    }
    ArgumentCopies(const ArgumentCopies&) = delete;
    ~ArgumentCopies() {
        for (void* copy : copies_) std::free(copy);
    }
    void* const* data() const { return copies_.data(); }

private:
    std::vector<void*> copies_;
};

}  // namespace

// Zero, or one with `message` filled.
extern "C" __attribute__((visibility("default"))) int cuda_on_cpu_launch(
    const Kernel* kernel, const Request* request, const void* const* arguments, char* message, std::size_t capacity) {
    Outcome outcome;
    try {
        const ArgumentCopies copies(*kernel, arguments);
        const auto& [grid, block, cluster, cooperative, workers, padding, dynamic_bytes, order] = *request;
        const Launch launch{*kernel, copies.data(), extents(grid), extents(block), cluster, cooperative != 0,
            dynamic_bytes, order};
        check(launch);
        run_grid(launch, workers, outcome);
    } catch (const std::exception& error) {
        outcome.fail(0, error.what());
    }
    std::snprintf(message, capacity, "%s", outcome.message().c_str());
    return outcome.failed();
}

}  // namespace cuda_on_cpu
