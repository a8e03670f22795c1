"""Kernels compiled by numba, which reads bytecode: for installations that do not have cubn's source.

The same functions and instructions as in language.py, so the same bits; it takes several times as long.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import config
from numba.core.typing.templates import make_intrinsic_template
from numba.extending import typeof_impl

from cubn.backends.cpu.expressions import Function
from cubn.backends.cpu.simd import Instruction, Value, Values

_KINDS = {2: types.void(types.intp, types.intp), 3: types.intp(types.intp, types.intp, types.intp)}
"""Of functions by their number of arguments: kernels, and builtin functions of Python."""


def llvm_ir(entry: Callable[..., int | None], name: str) -> str:
    """A module that has the function under this name, its arguments and what it returns int64."""
    settings: Any = config
    disabled, settings.DISABLE_JIT = settings.DISABLE_JIT, 0  # that is for functions that run without it
    try:
        native = cfunc(_KINDS[entry.__code__.co_argcount], nogil=True, error_model="numpy")(entry)
    finally:
        settings.DISABLE_JIT = disabled
    return str(native.inspect_llvm()).replace(native.native_name, name)


@typeof_impl.register(Function)
def _type_of_function(function: Function, context: Any) -> Any:
    return types.Dispatcher(_compiled(function))


@typeof_impl.register(Instruction)
def _type_of_instruction(instruction: Instruction, context: Any) -> Any:
    return types.Function(_template(instruction))


@functools.cache
def _compiled(function: Function) -> Any:
    # Only ever called by a kernel, so it needs no entry points of its own.
    options: Any = {"error_model": "numpy", "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return njit(**options)(function.python)


@functools.cache
def _template(instruction: Instruction) -> Any:
    """What numba knows an intrinsic by."""
    emit, result = instruction

    def typed(typing_context: Any, *args: Any) -> Any:
        kinds = [_kind(argument) for argument in args]
        returned = types.void if result is None else kinds[0] if result is Values else types.intp

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            out = emit(*(_taken(builder, kind, value) for kind, value in zip(kinds, values, strict=True)))
            if isinstance(out, tuple):
                return context.make_tuple(builder, returned, [value.v for value in out])
            return context.get_dummy_value() if out is None else out.v

        return returned(*kinds), codegen

    # numba reads arity and argument names off the signature, and cannot lower *args.
    context = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(emit).parameters.values()
    typed.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    return make_intrinsic_template(instruction, typed, emit.__name__)  # type: ignore[no-untyped-call]


def _kind(argument: Any) -> Any:
    """The numba type an instruction takes an argument as."""
    if isinstance(argument, types.BaseTuple):
        return types.UniTuple(types.intp, len(argument))  # type: ignore[no-untyped-call]
    return types.intp


def _taken(builder: ir.IRBuilder, kind: Any, value: ir.Value) -> Value | Values:
    if isinstance(kind, types.UniTuple):
        return tuple(Value(builder, builder.extract_value(value, i)) for i in range(len(kind)))
    return Value(builder, value)
