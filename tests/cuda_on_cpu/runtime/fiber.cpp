#include "fiber.h"

#include <sys/mman.h>

#include <new>

// System V x86-64: the callee-saved registers, and the stack pointer. A jump instead of `ret`, whose target the
// processor would predict from the other stack's calls.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.local cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx
)");

namespace cuda_on_cpu {

namespace {
struct OsThread {
    void* stack_pointer = nullptr;
    SwitchHooks hooks;
};
__thread OsThread* os_thread __attribute__((tls_model("initial-exec"))) = nullptr;
}  // namespace

void Fiber::adopt_os_thread() {
    static thread_local OsThread self;
    self.hooks.adopt_current();
    os_thread = &self;
}

SwitchHooks& Fiber::os_thread_hooks() { return os_thread->hooks; }

Fiber::~Fiber() {
    if (created_) hooks_.destroy_fiber();
}

void Fiber::prepare(char* stack, void (*body)(), unsigned stagger) {
    if (!created_) hooks_.create_fiber();
    created_ = true;
    hooks_.set_stack(stack, stack_bytes);
    // The stack as cuda_on_cpu_switch left it: six registers, then the address to return to, then body's own return.
    void** top = reinterpret_cast<void**>(stack + stack_bytes - stagger % 128 * 320);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(body);
    stack_pointer_ = top - 8;
}

void Fiber::resume() {
    OsThread& self = *os_thread;
    self.hooks.before_switch_to(hooks_);
    cuda_on_cpu_switch(&self.stack_pointer, stack_pointer_);
    self.hooks.after_switch_back();
}

void Fiber::suspend() {
    hooks_.before_switch_to(os_thread->hooks);
    cuda_on_cpu_switch(&stack_pointer_, os_thread->stack_pointer);
    hooks_.after_switch_back();
}

void Fiber::enter() { os_thread->hooks.first_entry(os_thread->hooks); }

Pages::Pages(std::size_t bytes) : bytes_(bytes) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<char*>(pages);
}

Pages::~Pages() {
    unpoison(begin_, bytes_);
    munmap(begin_, bytes_);
}

}  // namespace cuda_on_cpu
