"""The language kernels are written in, and how it becomes LLVM IR.

A kernel is a function in Python's syntax on 64-bit integers and tuples of them: `if`, `while`, `for ... in range(...)`,
arithmetic and comparisons as Python defines them, `min` and `max`, and calls of instructions (simd.py) and of other
such functions. Names of the functions around it, and of its module, are constants; a branch that they decide is not
compiled. So little of Python needs no inference of types, and is translated in milliseconds.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from llvmlite import ir

from cubn.backends.cpu.expressions import Compiled, Function, NotInTheLanguage, leaves, reshaped
from cubn.backends.cpu.simd import I64
from cubn.backends.cpu.translation import Body

__all__ = ["Function", "NoSource", "NotInTheLanguage", "llvm_ir"]


def llvm_ir(entries: dict[str, Callable[..., int | None]]) -> str:
    """A module that has every function under its name, its arguments and what it returns int64."""
    module = _Module()
    for name, python in entries.items():
        module.compiled(python, (None,) * python.__code__.co_argcount, name)
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
    """A function's source. It is not what was loaded, where the package was upgraded under a running process."""
    code = python.__code__
    text = "".join(linecache.getlines(code.co_filename, python.__globals__))
    try:
        tree, found = _functions(code.co_filename, text)[code.co_name, code.co_firstlineno]
    except (KeyError, SyntaxError, ValueError) as error:
        raise NoSource(f"{code.co_filename} does not hold what was loaded from it") from error
    if any(getattr(found, part) != getattr(code, part) for part in _MEANING):
        raise NoSource(f"{code.co_filename} was changed since it was loaded")
    return tree


_MEANING = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars")
"""What two functions that do the same have in common."""


@functools.lru_cache(16)
def _functions(file: str, text: str) -> dict[tuple[str, int], tuple[ast.FunctionDef, CodeType]]:
    """The functions in a file, by name and first line: as trees, and as bytecode."""
    module = ast.parse(text)
    loaded = compile(module, file, "exec", dont_inherit=True)
    codes = {(code.co_name, code.co_firstlineno): code for code in _within(loaded)}
    found = {}
    for tree in ast.walk(module):
        if isinstance(tree, ast.FunctionDef):
            place = tree.name, min([tree.lineno, *(decorator.lineno for decorator in tree.decorator_list)])
            if place in codes:  # else a branch that is never taken
                found[place] = tree, codes[place]
    return found


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _within(constant)


def _results(tree: ast.FunctionDef) -> int | None:
    """What a function returns, as in `Compiled`: a tuple must be written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value:
            return len(node.value.elts) if isinstance(node.value, ast.Tuple) else 0
    return None
