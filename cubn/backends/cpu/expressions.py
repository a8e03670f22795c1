"""Expressions of the language of kernels, as LLVM IR. See language.py."""

from __future__ import annotations

import ast
import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir

from cubn.backends.cpu.simd import I1, I64, Instruction, Value

Lowered = Any  # an integer of the compiler's, an LLVM integer, or a tuple of such

_ARITHMETIC: dict[type[ast.operator], tuple[Callable[[int, int], int], Callable[..., ir.Value]]] = {
    ast.Add: (operator.add, lambda b, x, y: b.add(x, y, flags=("nsw",))),
    ast.Sub: (operator.sub, lambda b, x, y: b.sub(x, y, flags=("nsw",))),
    ast.Mult: (operator.mul, lambda b, x, y: b.mul(x, y, flags=("nsw",))),
    ast.FloorDiv: (operator.floordiv, lambda b, x, y: _floor_division(b, x, y)[0]),
    ast.Mod: (operator.mod, lambda b, x, y: _floor_division(b, x, y)[1]),
    ast.LShift: (operator.lshift, lambda b, x, y: b.shl(x, y)),
    ast.RShift: (operator.rshift, lambda b, x, y: b.ashr(x, y)),
    ast.BitAnd: (operator.and_, lambda b, x, y: b.and_(x, y)),
    ast.BitOr: (operator.or_, lambda b, x, y: b.or_(x, y)),
}
_COMPARISONS: dict[type[ast.cmpop], tuple[Callable[[int, int], bool], str]] = {
    ast.Eq: (operator.eq, "=="),
    ast.NotEq: (operator.ne, "!="),
    ast.Lt: (operator.lt, "<"),
    ast.LtE: (operator.le, "<="),
    ast.Gt: (operator.gt, ">"),
    ast.GtE: (operator.ge, ">="),
}
_BUILTINS = {"min": min, "max": max, "range": range}


class Function:
    """Decorator of a function that kernels call."""

    def __init__(self, python: Callable[..., Any]) -> None:
        self.python = python


class NotInTheLanguage(SyntaxError):
    """A kernel says what the language has no word for."""


class Compiled(NamedTuple):
    """A function for arguments of one shape."""

    function: ir.Function
    results: int | None  # a tuple's length; 0 is a lone integer, None nothing


def shape_of(value: Lowered) -> Any:
    """None for an integer, a tuple of shapes for a tuple."""
    return tuple(map(shape_of, value)) if isinstance(value, tuple) else None


def leaves(value: Any) -> Iterator[Any]:
    """What is in a tuple, in tuples within it, and so on."""
    if isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def reshaped(shape: Any, flat: Iterator[Any]) -> Any:
    """The opposite of `leaves`, by the shape of what these are the leaves of."""
    return tuple(reshaped(part, flat) for part in shape) if isinstance(shape, tuple) else next(flat)


def _floor_division(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(x // y, x % y) as Python has them: the remainder has y's sign."""
    if isinstance(y, ir.Constant) and y.constant > 0 and y.constant & (y.constant - 1) == 0:
        return b.ashr(x, I64(y.constant.bit_length() - 1)), b.and_(x, I64(y.constant - 1))
    quotient, remainder = b.sdiv(x, y), b.srem(x, y)
    differs = b.icmp_signed("<", b.xor(remainder, y), I64(0))
    below = b.and_(differs, b.icmp_signed("!=", remainder, I64(0)))
    return b.sub(quotient, b.zext(below, I64)), b.select(below, b.add(remainder, y), remainder)


class Expressions:
    """What a function's body knows, and the values in it.

    A variable lives in memory until LLVM puts it into a register.
    """

    def __init__(
        self,
        called: Callable[[Callable[..., Any], tuple[Any, ...]], Compiled],
        python: Callable[..., Any],
        compiled: Compiled,
    ) -> None:
        self.called, self.python, self.compiled = called, python, compiled
        closure = zip(python.__code__.co_freevars, python.__closure__ or (), strict=True)
        self.constants = _BUILTINS | python.__globals__ | {name: cell.cell_contents for name, cell in closure}
        self.variables: dict[str, Any] = {}
        self.choices = itertools.count()
        self.entry = ir.IRBuilder(compiled.function.append_basic_block("variables"))
        self.b = ir.IRBuilder(compiled.function.append_basic_block("body"))

    def _known(self, node: ast.AST, prefix: str) -> Callable[[Any], Any]:
        method = getattr(self, f"{prefix}_{type(node).__name__}", None)
        if method is None:
            raise self._unknown(node)
        return method  # type: ignore[no-any-return]

    def _unknown(self, node: Any) -> NotInTheLanguage:
        code = self.python.__code__
        text = f"kernels are written in a part of Python, without {ast.unparse(node)!r}"
        return NotInTheLanguage(text, (code.co_filename, node.lineno, node.col_offset, None))

    def _branch(self, test: ir.Value, body: Callable[[], None], otherwise: Callable[[], None]) -> None:
        then, other, end = (self.b.append_basic_block(name) for name in ("then", "else", "end"))
        self.b.cbranch(self._truth(test), then, other)
        for block, write in ((then, body), (other, otherwise)):
            self.b.position_at_end(block)
            write()
            if not self.b.block.is_terminated:
                self.b.branch(end)
        self.b.position_at_end(end)

    # variables

    def _set(self, name: str, value: Lowered) -> None:
        if name not in self.variables:
            self.variables[name] = reshaped(shape_of(value), iter([self.entry.alloca(I64) for _ in leaves(value)]))
        for slot, one in zip(leaves(self.variables[name]), leaves(value), strict=True):
            self.b.store(self._integer(one), slot)

    def _name(self, node: ast.expr) -> Lowered:
        if not isinstance(node, ast.Name):
            raise self._unknown(node)
        if node.id in self.variables:
            slots = self.variables[node.id]
            return reshaped(shape_of(slots), iter([self.b.load(slot, typ=I64) for slot in leaves(slots)]))
        if node.id in self.constants:
            return self.constants[node.id]
        raise self._unknown(node)

    # expressions

    def _value(self, node: ast.expr) -> Lowered:
        return self._known(node, "_expression")(node)

    def _integer(self, value: Lowered) -> ir.Value:
        """As an i64: a truth is 0 or 1."""
        if not isinstance(value, ir.Value):
            return I64(int(value))
        return self.b.zext(value, I64) if value.type == I1 else value

    def _truth(self, value: Lowered) -> ir.Value:
        if not isinstance(value, ir.Value):
            return I1(bool(value))
        return value if value.type == I1 else self.b.icmp_signed("!=", value, I64(0))

    def _expression_Constant(self, node: ast.Constant) -> Lowered:
        return node.value

    def _expression_Name(self, node: ast.Name) -> Lowered:
        return self._name(node)

    def _expression_Attribute(self, node: ast.Attribute) -> Lowered:
        return getattr(self._value(node.value), node.attr)

    def _expression_Tuple(self, node: ast.Tuple) -> Lowered:
        return tuple(self._value(part) for part in node.elts)

    def _expression_Subscript(self, node: ast.Subscript) -> Lowered:
        return self._value(node.value)[self._value(node.slice)]

    def _expression_BinOp(self, node: ast.BinOp) -> Lowered:
        return self._arithmetic(node, node.op, self._value(node.left), self._value(node.right))

    def _arithmetic(self, node: ast.AST, operation: ast.operator, x: Lowered, y: Lowered) -> Lowered:
        if type(operation) not in _ARITHMETIC:
            raise self._unknown(node)
        now, later = _ARITHMETIC[type(operation)]
        if not isinstance(x, ir.Value) and not isinstance(y, ir.Value):
            return now(x, y)
        return later(self.b, self._integer(x), self._integer(y))

    def _expression_UnaryOp(self, node: ast.UnaryOp) -> Lowered:
        value = self._value(node.operand)
        if isinstance(node.op, ast.USub):
            return self._arithmetic(node, ast.Sub(), 0, value)
        if not isinstance(node.op, ast.Not):
            raise self._unknown(node)
        return self.b.not_(self._truth(value)) if isinstance(value, ir.Value) else not value

    def _expression_Compare(self, node: ast.Compare) -> Lowered:
        if not all(type(operation) in _COMPARISONS for operation in node.ops):
            raise self._unknown(node)
        values = [self._value(one) for one in (node.left, *node.comparators)]
        pairs = zip(node.ops, itertools.pairwise(values), strict=True)
        return functools.reduce(self._both, (self._compared(type(operation), *pair) for operation, pair in pairs))

    def _compared(self, operation: type[ast.cmpop], x: Lowered, y: Lowered) -> Lowered:
        now, sign = _COMPARISONS[operation]
        if not isinstance(x, ir.Value) and not isinstance(y, ir.Value):
            return now(x, y)
        return self.b.icmp_signed(sign, self._integer(x), self._integer(y))

    def _both(self, x: Lowered, y: Lowered) -> Lowered:
        return self.b.and_(self._truth(x), self._truth(y))

    def _expression_BoolOp(self, node: ast.BoolOp) -> Lowered:
        """`and` and `or`, as truths; what need not be evaluated is not."""
        decides = isinstance(node.op, ast.Or)
        first, *others = node.values
        value = self._value(first)
        rest = ast.copy_location(ast.BoolOp(node.op, others), node) if len(others) > 1 else others[0]
        if not isinstance(value, ir.Value):
            return decides if bool(value) is decides else self._value(rest)
        test = self._truth(value)
        return self._chosen(
            test if decides else self.b.not_(test), lambda: I1(decides), lambda: self._truth(self._value(rest))
        )

    def _expression_IfExp(self, node: ast.IfExp) -> Lowered:
        test = self._value(node.test)
        if not isinstance(test, ir.Value):
            return self._value(node.body if test else node.orelse)
        return self._chosen(test, lambda: self._value(node.body), lambda: self._value(node.orelse))

    def _chosen(self, test: ir.Value, body: Callable[[], Lowered], otherwise: Callable[[], Lowered]) -> Lowered:
        name = f"choice {next(self.choices)}"
        self._branch(test, lambda: self._set(name, body()), lambda: self._set(name, otherwise()))
        return self._name(ast.Name(name))

    def _expression_Call(self, node: ast.Call) -> Lowered:
        if node.keywords:
            raise self._unknown(node)
        called, given = self._value(node.func), tuple(self._value(argument) for argument in node.args)
        if called in (min, max):
            x, y = map(self._integer, given)
            return self.b.select(self.b.icmp_signed("<" if called is min else ">", x, y), x, y)
        if isinstance(called, Instruction):
            return self._instruction(called, given)
        if isinstance(called, Function):
            return self._call(called, given)
        raise self._unknown(node)

    def _instruction(self, instruction: Instruction, given: tuple[Lowered, ...]) -> Lowered:
        def wrapped(value: Lowered) -> Any:
            return tuple(map(wrapped, value)) if isinstance(value, tuple) else Value(self.b, self._integer(value))

        result = instruction.emit(*map(wrapped, given))
        return tuple(one.v for one in result) if isinstance(result, tuple) else result and result.v

    def _call(self, function: Function, given: tuple[Lowered, ...]) -> Lowered:
        compiled = self.called(function.python, tuple(map(shape_of, given)))
        result = self.b.call(compiled.function, [self._integer(one) for one in leaves(given)])
        if compiled.results:
            return tuple(self.b.extract_value(result, i) for i in range(compiled.results))
        return result
