// For ThreadSanitizer: fences order the relaxed atomics around them, and nothing else does. What a thread did before a
// fence happens before what another does after a fence if an atomic of the one after its fence is seen by an atomic of
// the other before its fence. ThreadSanitizer itself knows no fences.
#pragma once
#include <memory>

#include "fiber.h"
#include "sanitizers.h"

namespace cuda_on_cpu {

class MemoryOrder {
public:
    // A new block's thread has no past.
    void restart() { clocks_.reset(); }

    void fence() {
        Clocks& clocks = begun();
        with(clocks.seen, [&] { release(&clocks.incoming); });
        acquire(&clocks.incoming);
        release(&clocks.outgoing);
        with(clocks.published, [&] { acquire(&clocks.outgoing); });
    }
    void before_atomic(void* address) {
        with(begun().published, [&] { release(address); });
    }
    void after_atomic(void* address) {
        with(begun().seen, [&] { acquire(address); });
    }

private:
    struct Clocks {
        Clocks() { published.create_fiber(), seen.create_fiber(); }
        Clocks(const Clocks&) = delete;
        ~Clocks() { published.destroy_fiber(), seen.destroy_fiber(); }

        SwitchHooks published;  // the thread's clock at its last fence
        SwitchHooks seen;       // what its atomics have seen
        char incoming = 0, outgoing = 0;
    };

    // In place of the running thread, so that `clock` takes the part of the thread's in what `action` does.
    template <class Action> static void with(SwitchHooks& clock, Action action) {
        SwitchHooks self;
        self.adopt_current();
        self.before_switch_to(clock);
        action();
        clock.before_switch_to(self);
    }

    // Made by the OS thread, as a clock begins as its maker's, and this thread's is not published yet.
    Clocks& begun() {
        if (!clocks_) with(Fiber::os_thread_hooks(), [&] { clocks_ = std::make_unique<Clocks>(); });
        return *clocks_;
    }

    std::unique_ptr<Clocks> clocks_;
};

}  // namespace cuda_on_cpu
