"""Instructions for native code around kernels: atomics, calls by address, memory on the stack, and the floating-point
environment that kernels compute in.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

from llvmlite import ir

from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.simd import DOUBLE, I8, I32, I64, Value, get, instruction, pointer, put
from cubn.backends.cpu.words import DEFAULT_MODE, SAVE_MODE, SET_MODE

X86 = platform.machine() in ("x86_64", "AMD64")
MXCSR = 0x1F80  # the default of the register that all floating-point arithmetic of kernels obeys on x86-64


@instruction(I64)
def load_acquire(address: Value) -> Value:
    b = address.b
    return Value(b, b.load_atomic(pointer(address, I64), "acquire", 8, typ=I64))


@instruction()
def store_release(address: Value, value: Value) -> None:
    address.b.store_atomic(value.v, pointer(address, I64), "release", 8)


@instruction(I64)
def compare_exchange(address: Value, before: Value, after: Value) -> Value:
    """1 if it happened."""
    b = address.b
    pair = b.cmpxchg(pointer(address, I64), before.v, after.v, "acq_rel", "monotonic")
    return Value(b, b.zext(b.extract_value(pair, 1), I64))


@instruction()
def add_one(address: Value) -> None:
    address.b.atomic_rmw("add", pointer(address, I64), I64(1), "release")


@instruction(I64)
def call(function: Value, first: Value, second: Value) -> Value:
    """A function of up to two integers or addresses, by its own address; of one that returns nothing, anything."""
    b, kind = function.b, ir.FunctionType(I64, [I64] * 2)
    return Value(b, b.call(b.inttoptr(function.v, ir.PointerType(kind)), [first.v, second.v]))


@instruction(I64)
def call_for_int(function: Value) -> Value:
    """The C int that a function of nothing returns."""
    b, kind = function.b, ir.FunctionType(I32, [])
    return Value(b, b.sext(b.call(b.inttoptr(function.v, ir.PointerType(kind)), []), I64))


@instruction(I64)
def call_for_float(function: Value, first: Value) -> Value:
    """The bits of the float64 that a function of an address returns."""
    b, kind = function.b, ir.FunctionType(DOUBLE, [I64])
    return Value(b, b.bitcast(b.call(b.inttoptr(function.v, ir.PointerType(kind)), [first.v]), I64))


def on_stack(size: int, align: int) -> Callable[[Value], Value]:
    """Emits memory that lasts until the function returns."""

    def emit(anything: Value) -> Value:
        b = anything.b
        with b.goto_entry_block():
            room = b.alloca(ir.ArrayType(I64, size // 8))
            room.align = align
        return Value(b, b.ptrtoint(room, I64))

    return emit


@instruction()
def pause(anything: Value) -> None:
    if X86:
        _intrinsic(anything, "llvm.x86.sse2.pause")


@instruction()
def save_mxcsr(to: Value) -> None:
    _intrinsic(to, "llvm.x86.sse.stmxcsr", pointer(to, I8))


@instruction()
def load_mxcsr(source: Value) -> None:
    _intrinsic(source, "llvm.x86.sse.ldmxcsr", pointer(source, I8))


def _intrinsic(anything: Value, name: str, *arguments: ir.Value) -> None:
    b, kind = anything.b, ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), arguments)


@jit
def enter_default_mode(pool, callers):  # type: ignore[no-untyped-def]
    """Compute in the default floating-point environment, and keep the caller's."""
    if X86:
        save_mxcsr(callers)
        put(callers + 8, MXCSR)
        load_mxcsr(callers + 8)
    else:
        call(get(pool + SAVE_MODE), callers, 0)
        call(get(pool + SET_MODE), get(pool + DEFAULT_MODE), 0)


@jit
def leave_default_mode(pool, callers):  # type: ignore[no-untyped-def]
    if X86:
        load_mxcsr(callers)
    else:
        call(get(pool + SET_MODE), callers, 0)
