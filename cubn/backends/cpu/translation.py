"""The body of a function in the language of kernels, as LLVM IR. See language.py."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any, NamedTuple

from llvmlite import ir

from cubn.backends.cpu.expressions import Expressions, Lowered
from cubn.backends.cpu.simd import I64


class Loop(NamedTuple):
    """Where `continue` and `break` go."""

    again: ir.Block
    end: ir.Block


class Body(Expressions):
    """One function's body, statement by statement."""

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self.loops: list[Loop] = []

    def write(self, tree: ast.FunctionDef, arguments: tuple[Lowered, ...]) -> None:
        names = [argument.arg for argument in tree.args.args]
        for name, value in zip(names, arguments, strict=True):
            self._set(name, value)
        self._statements(tree.body)
        if not self.b.block.is_terminated:
            if self.compiled.results is None:
                self.b.ret_void()
            else:  # behind an endless loop
                self.b.unreachable()
        self.entry.position_at_end(self.entry.block)  # behind what instructions put there
        self.entry.branch(self.compiled.function.blocks[1])

    # statements

    def _statements(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            if self.b.block.is_terminated:
                return
            self._known(statement, "_statement")(statement)

    def _statement_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # else a docstring
            self._value(node.value)

    def _statement_Assign(self, node: ast.Assign) -> None:
        (target,) = node.targets
        self._assign(target, self._value(node.value))

    def _statement_AugAssign(self, node: ast.AugAssign) -> None:
        self._assign(node.target, self._arithmetic(node, node.op, self._name(node.target), self._value(node.value)))

    def _assign(self, target: ast.expr, value: Lowered) -> None:
        if isinstance(target, ast.Tuple):
            for part, one in zip(target.elts, value, strict=True):
                self._assign(part, one)
        elif isinstance(target, ast.Name):
            self._set(target.id, value)
        else:
            raise self._unknown(target)

    def _statement_Return(self, node: ast.Return) -> None:
        if node.value is None:
            self.b.ret_void()
            return
        value = self._value(node.value)
        if not self.compiled.results:
            self.b.ret(self._integer(value))
            return
        struct = ir.Constant(self.compiled.function.function_type.return_type, ir.Undefined)
        for i, one in enumerate(value):
            struct = self.b.insert_value(struct, self._integer(one), i)
        self.b.ret(struct)

    def _statement_If(self, node: ast.If) -> None:
        test = self._value(node.test)
        if not isinstance(test, ir.Value):
            self._statements(node.body if test else node.orelse)
            return
        self._branch(test, lambda: self._statements(node.body), lambda: self._statements(node.orelse))

    def _statement_While(self, node: ast.While) -> None:
        test, body, end = (self.b.append_basic_block(name) for name in ("test", "body", "end"))
        self.b.branch(test)
        self.b.position_at_end(test)
        self.b.cbranch(self._truth(self._value(node.test)), body, end)
        self._loop(node, body, Loop(test, end))

    def _statement_For(self, node: ast.For) -> None:
        call = node.iter
        if not isinstance(call, ast.Call) or self._value(call.func) is not range or node.orelse:
            raise self._unknown(node)
        given = [self._value(argument) for argument in call.args]
        first, stop, step = (0, given[0], 1) if len(given) == 1 else (*given, 1)[:3]
        if not isinstance(step, int):
            raise self._unknown(node)
        stop = self._integer(stop)
        counter = self.entry.alloca(I64)
        self.b.store(self._integer(first), counter)
        test, body, again, end = (self.b.append_basic_block(name) for name in ("test", "body", "again", "end"))
        self.b.branch(test)
        self.b.position_at_end(test)
        self.b.cbranch(self.b.icmp_signed("<" if step > 0 else ">", self.b.load(counter, typ=I64), stop), body, end)
        self.b.position_at_end(again)
        self.b.store(self.b.add(self.b.load(counter, typ=I64), I64(step), flags=("nsw",)), counter)
        self.b.branch(test)
        self.b.position_at_end(body)
        self._assign(node.target, self.b.load(counter, typ=I64))
        self._loop(node, body, Loop(again, end))

    def _loop(self, node: ast.For | ast.While, body: ir.Block, loop: Loop) -> None:
        if node.orelse:
            raise self._unknown(node)
        self.b.position_at_end(body)
        self.loops.append(loop)
        self._statements(node.body)
        self.loops.pop()
        if not self.b.block.is_terminated:
            self.b.branch(loop.again)
        self.b.position_at_end(loop.end)

    def _statement_Break(self, node: ast.Break) -> None:
        self.b.branch(self.loops[-1].end)

    def _statement_Continue(self, node: ast.Continue) -> None:
        self.b.branch(self.loops[-1].again)

    def _statement_Pass(self, node: ast.Pass) -> None:
        pass
