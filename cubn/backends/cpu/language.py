"""The language kernels are written in, and how it becomes LLVM IR.

A kernel is a function in Python's syntax on 64-bit integers and tuples of them: `if`, `while`, `for ... in range(...)`,
arithmetic and comparisons as Python defines them, `min` and `max`, and calls of instructions (simd.py) and of other
such functions. Names of the functions around it, and of its module, are constants; a branch that they decide is not
compiled. So little of Python needs no inference of types, and is translated in milliseconds.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import tokenize
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any

from llvmlite import ir

from cubn.backends.cpu.simd import I64
from cubn.backends.cpu.translation import Body, Compiled, Function, NotInTheLanguage, leaves, reshaped

__all__ = ["Function", "NoSource", "NotInTheLanguage", "llvm_ir"]


def llvm_ir(entries: dict[str, Callable[[int, int], None]]) -> str:
    """A module that has every function under its name, as void(int64, int64)."""
    module = _Module()
    for name, python in entries.items():
        module.compiled(python, (None, None), name)
    return module.text()


class _Module:
    """What is compiled together."""

    def __init__(self) -> None:
        self.ir = ir.Module()
        self.functions: dict[Any, Compiled] = {}
        self.calls: Counter[ir.Function] = Counter()

    def compiled(self, python: Callable[..., Any], shapes: tuple[Any, ...], name: str | None = None) -> Compiled:
        """The function for arguments of these shapes (None: an integer; a tuple: of such)."""
        key = python, shapes
        if key not in self.functions:
            tree = _tree(python)
            results = _results(tree)
            kind = ir.VoidType() if results is None else ir.LiteralStructType([I64] * results) if results else I64
            signature = ir.FunctionType(kind, [I64 for _ in leaves(shapes)])
            function = ir.Function(self.ir, signature, name or self.ir.get_unique_name(python.__name__))
            if name is None:
                function.linkage = "internal"
            self.functions[key] = Compiled(function, results)
            Body(self.called, python, self.functions[key]).write(tree, reshaped(shapes, iter(function.args)))
        return self.functions[key]

    def called(self, python: Callable[..., Any], shapes: tuple[Any, ...]) -> Compiled:
        """The same, for a call of it."""
        found = self.compiled(python, shapes)
        self.calls[found.function] += 1
        return found

    def text(self) -> str:
        """What is called once becomes part of its caller first of all: LLVM then optimises it only once."""
        for function, count in self.calls.items():
            if count == 1:
                function.attributes.add("alwaysinline")
        return str(self.ir)


class NoSource(OSError):
    """A function's source is not there, or another than the one it was loaded from."""


def _tree(python: Callable[..., Any]) -> ast.FunctionDef:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(python))).body
    except (OSError, SyntaxError, tokenize.TokenError) as error:
        raise NoSource(str(error)) from error
    if not isinstance(tree, ast.FunctionDef) or not _is_of(tree, python.__code__):
        raise NoSource(f"{python.__code__.co_filename} was changed since it was loaded")
    ast.increment_lineno(tree, python.__code__.co_firstlineno - 1)
    return tree


def _is_of(tree: ast.FunctionDef, code: CodeType) -> bool:
    """Whether this is the source of that bytecode, as far as names and constants tell."""
    plain = ast.FunctionDef(tree.name, tree.args, tree.body, [], tree.returns, lineno=1, col_offset=0)
    module = compile(ast.Module([plain], []), code.co_filename, "exec")
    found: CodeType = next(one for one in module.co_consts if isinstance(one, CodeType))
    return (found.co_name, found.co_varnames, found.co_consts, {*found.co_names}) == (
        code.co_name,
        code.co_varnames,
        code.co_consts,
        {*code.co_names, *code.co_freevars},
    )


def _results(tree: ast.FunctionDef) -> int | None:
    """What a function returns, as in `Compiled`: a tuple must be written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value:
            return len(node.value.elts) if isinstance(node.value, ast.Tuple) else 0
    return None
