"""Vectors of 16 lanes, and the instructions kernels are written in.

A kernel is loops and index arithmetic (language.py), on nothing but 64-bit integers (counts and
addresses). What it does to data is a handful of *instructions*, each a Python function that emits LLVM IR through
`Value`, so that it reads as the arithmetic it is; between instructions data lives in memory. LLVM turns 16 lanes into
whatever registers the machine has. No instruction carries a fast-math flag: each + - * / is one IEEE-754 operation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from cubn._types import ITEMSIZE
from cubn.backends.cpu.conversions import narrowed_bfloat, narrowed_half, widened_bfloat, widened_half

LANES = 16

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()

STORED = {"float16": I16, "bfloat16": I16, "float32": FLOAT, "float64": DOUBLE}
WIDENED = {"float16": widened_half, "bfloat16": widened_bfloat}
NARROWED = {"float16": narrowed_half, "bfloat16": narrowed_bfloat}


class Value:
    """An LLVM value under a builder, with the operators of what it stands for (float vectors and scalars, 64-bit
    integers).
    """

    __slots__ = ("b", "v")

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.b, self.v = builder, value

    @property
    def type(self) -> ir.Type:
        return self.v.type

    def _is_integer(self) -> bool:
        return isinstance(getattr(self.type, "element", self.type), ir.IntType)

    def _other(self, other: Value | int) -> ir.Value:
        return ir.Constant(self.type, other) if isinstance(other, int) else other.v

    def __add__(self, other: Value | int) -> Value:
        op = self.b.add if self._is_integer() else self.b.fadd
        return Value(self.b, op(self.v, self._other(other)))

    def __sub__(self, other: Value | int) -> Value:
        op = self.b.sub if self._is_integer() else self.b.fsub
        return Value(self.b, op(self.v, self._other(other)))

    def __mul__(self, other: Value | int) -> Value:
        op = self.b.mul if self._is_integer() else self.b.fmul
        return Value(self.b, op(self.v, self._other(other)))

    __rmul__ = __mul__

    def __truediv__(self, other: Value) -> Value:
        return Value(self.b, self.b.fdiv(self.v, other.v))


Values = tuple[Value, ...]
"""One of each array: addresses, or steps."""


def shifted(at: Values, steps: Sequence[Value | int], count: Value | int) -> Values:
    """Addresses so many steps further on."""
    return tuple(address + step * count for address, step in zip(at, steps, strict=True))


def constant(like: Value, number: float) -> Value:
    """`number` in every lane of `like`'s type."""
    kind = like.type
    value = ir.Constant(kind, [number] * kind.count) if isinstance(kind, ir.VectorType) else ir.Constant(kind, number)
    return Value(like.b, value)


def splat(value: Value) -> Value:
    """A scalar in every lane."""
    vector = ir.VectorType(value.type, LANES)
    one = value.b.insert_element(ir.Constant(vector, ir.Undefined), value.v, I32(0))
    return Value(value.b, value.b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)))


def shuffle(a: Value, b: Value, lanes: Sequence[int]) -> Value:
    """Lanes of (a, b), a's first."""
    return Value(a.b, a.b.shuffle_vector(a.v, b.v, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))))


EVEN, ODD = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)


def plus_scaled(a: Value, v: Value, factor: Value) -> Value:
    """a + v * factor where that product is exact: then one rounding or two, as the processor has it, is the same."""
    b, kind = a.b, a.type
    name = f"llvm.fmuladd.v{kind.count}{_mangle(kind.element)}"
    return Value(b, b.call(_declare(b, name, ir.FunctionType(kind, [kind] * 3)), [v.v, factor.v, a.v]))


def first_lanes(count: Value) -> Value:
    """The <16 x i1> mask of lanes below `count`."""
    lane = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    bound = splat(Value(count.b, count.b.trunc(count.v, I32)))
    return Value(count.b, count.b.icmp_signed("<", lane, bound.v))


def select(mask: Value, a: Value, b: Value) -> Value:
    return Value(a.b, a.b.select(mask.v, a.v, b.v))


def not_positive(value: Value) -> Value:
    """value <= 0, false for a NaN."""
    return Value(value.b, value.b.fcmp_ordered("<=", value.v, constant(value, 0.0).v))


def ratio(a: Value, b: Value, kind: ir.Type) -> Value:
    """a / b of two counts, each exact in `kind`."""
    return convert(a, kind) / convert(b, kind)


def convert(count: Value, kind: ir.Type) -> Value:
    """A count as a float."""
    return Value(count.b, count.b.sitofp(count.v, kind))


def widen(value: Value, element: ir.Type) -> Value:
    """float32 lanes as float64, or as they are."""
    if value.type.element == element:
        return value
    return Value(value.b, value.b.fpext(value.v, ir.VectorType(element, value.type.count)))


def narrow(value: Value, element: ir.Type) -> Value:
    """float64 lanes rounded to float32."""
    return Value(value.b, value.b.fptrunc(value.v, ir.VectorType(element, LANES)))


def pointer(address: Value, kind: ir.Type) -> ir.Value:
    return address.b.inttoptr(address.v, ir.PointerType(kind))


def scalar_at(address: Value, kind: ir.Type, align: int) -> Value:
    one = address.b.load(pointer(address, kind), typ=kind)
    one.align = align
    return Value(address.b, one)


def load_raw(address: Value, element: ir.Type, align: int, mask: Value | None = None, lanes: int = LANES) -> Value:
    """16 elements, or `lanes`; with a mask, which has 16, the others are zero and their memory is not touched."""
    b, vector = address.b, ir.VectorType(element, lanes)
    if mask is None:
        value = b.load(pointer(address, vector), typ=vector)
        value.align = align
        return Value(b, value)
    name = f"llvm.masked.load.v16{_mangle(element)}.p0"
    kind = ir.FunctionType(vector, [ir.PointerType(vector), I32, mask.type, vector])
    zero = ir.Constant(vector, None)
    return Value(b, b.call(_declare(b, name, kind), [pointer(address, vector), I32(align), mask.v, zero]))


def store_raw(value: Value, address: Value, align: int, mask: Value | None = None, *, stream: bool = False) -> None:
    """16 elements, or those of the mask; `stream` bypasses the caches and needs the address aligned to the vector."""
    b = address.b
    if mask is not None:
        name = f"llvm.masked.store.v16{_mangle(value.type.element)}.p0"
        kind = ir.FunctionType(ir.VoidType(), [value.type, ir.PointerType(value.type), I32, mask.type])
        b.call(_declare(b, name, kind), [value.v, pointer(address, value.type), I32(align), mask.v])
        return
    store = b.store(value.v, pointer(address, value.type))
    store.align = align
    if stream:
        store.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))


def _mangle(element: ir.Type) -> str:
    return {FLOAT: "f32", DOUBLE: "f64"}.get(element) or f"i{element.width}"


def _width(element: ir.Type) -> int:
    return {FLOAT: 32, DOUBLE: 64}.get(element) or int(element.width)


def _declare(b: ir.IRBuilder, name: str, kind: ir.FunctionType) -> ir.Function:
    return b.module.globals.get(name) or ir.Function(b.module, kind, name)


def vector_of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _places(address: Value, stride: Value, element: ir.Type) -> ir.Value:
    """Addresses `stride` bytes apart."""
    b = address.b
    lane = Value(b, ir.Constant(vector_of(I64), list(range(LANES))))
    return b.inttoptr((splat(address) + lane * splat(stride)).v, vector_of(ir.PointerType(element)))


def load_strided(address: Value, stride: Value, element: ir.Type, mask: Value) -> Value:
    """As `load_raw`, from addresses `stride` bytes apart."""
    b, vector, places = address.b, vector_of(element), _places(address, stride, element)
    name = f"llvm.masked.gather.v16{_mangle(element)}.v16p0"
    kind = ir.FunctionType(vector, [places.type, I32, mask.type, vector])
    align = I32(_width(element) // 8)
    return Value(b, b.call(_declare(b, name, kind), [places, align, mask.v, ir.Constant(vector, None)]))


def store_strided(value: Value, address: Value, stride: Value, mask: Value) -> None:
    """As `store_raw`, to addresses `stride` bytes apart."""
    b, element = address.b, value.type.element
    places = _places(address, stride, element)
    name = f"llvm.masked.scatter.v16{_mangle(element)}.v16p0"
    kind = ir.FunctionType(ir.VoidType(), [value.type, places.type, I32, mask.type])
    b.call(_declare(b, name, kind), [value.v, places, I32(_width(element) // 8), mask.v])


LINE = 64  # bytes that are fetched together


def prefetch(address: Value, *, to_write: bool = False) -> None:
    """Ask for the cache line at an address; any address may be asked for."""
    b, byte = address.b, ir.PointerType(I8)
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    b.call(_declare(b, "llvm.prefetch.p0", kind), [pointer(address, I8), I32(int(to_write)), I32(3), I32(1)])


class Element:
    """How one dtype is stored, and the type it is computed in (`acc`)."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.stored = STORED[dtype]
        self.size = ITEMSIZE[dtype]
        self.acc = DOUBLE if dtype == "float64" else FLOAT
        self.acc_size = 8 if dtype == "float64" else 4

    def from_stored(self, raw: Value) -> Value:
        """Stored lanes (or one stored element) in acc: exact."""
        widened = WIDENED.get(self.dtype)
        return Value(raw.b, widened(raw.b, raw.v)) if widened else raw

    def to_stored(self, value: Value) -> Value:
        """Rounded to nearest even, once. A NaN stays a NaN."""
        narrowed = NARROWED.get(self.dtype)
        return Value(value.b, narrowed(value.b, value.v)) if narrowed else value

    def rounded(self, value: Value) -> Value:
        """acc lanes rounded to the dtype, in acc again."""
        return self.from_stored(self.to_stored(value)) if self.size == 2 else value

    def load(self, address: Value, mask: Value | None = None, lanes: int = LANES) -> Value:
        return self.from_stored(load_raw(address, self.stored, self.size, mask, lanes))

    def store(self, value: Value, address: Value, mask: Value | None = None, *, stream: bool = False) -> None:
        align = self.size * LANES if stream else self.size
        store_raw(self.to_stored(value), address, align, mask, stream=stream)

    def load_acc(self, address: Value, lanes: int = LANES) -> Value:
        """Lanes of acc from scratch memory."""
        return load_raw(address, self.acc, self.acc_size, None, lanes)

    def store_acc(self, value: Value, address: Value) -> None:
        store_raw(value, address, self.acc_size)


class Instruction(NamedTuple):
    """What a kernel calls to do something to data: `emit` writes it in LLVM IR."""

    emit: Callable[..., Value | Values | None]
    result: Any


def instruction(result: Any = None) -> Callable[[Callable[..., Value | Values | None]], Any]:
    """Make an instruction of a function that emits IR: emit(*arguments) -> Value (`result` is I64), Values as many as
    its first argument is (Values), or None.

    Values are 64-bit integers, arguments such values or tuples of them.
    """
    return functools.partial(Instruction, result=result)


@instruction(Values)
def moved(at: Values, steps: Values, count: Value) -> Values:
    """`shifted`, for kernels."""
    return shifted(at, steps, count)


def transposed(rows: Sequence[Value]) -> list[Value]:
    """The transpose of as many vectors as they have lanes, 8 or 16."""
    lanes = len(rows)

    def interleave(width: int) -> tuple[list[int], list[int]]:
        """Pick alternate runs of `width` lanes: lower halves of each 2*width block of both operands, then upper
        halves.
        """
        low, high = [], []
        for start in range(0, lanes, 2 * width):
            for side in (0, lanes):
                low += [side + start + i for i in range(width)]
                high += [side + start + width + i for i in range(width)]
        return low, high

    out = list(rows)
    for width in (1, 2, 4, 8)[: lanes.bit_length() - 1]:
        low, high = interleave(width)
        for i in range(lanes):
            if not i & width:
                a, b = out[i], out[i + width]
                out[i], out[i + width] = shuffle(a, b, low), shuffle(a, b, high)
    return out


def by_cases(value: Value, cases: Sequence[int], body: Callable[[int], None]) -> None:
    """Emit body(k) for each k and run the one that equals `value`, an integer known only at run time."""
    b = value.b
    end = b.append_basic_block("end")
    switch = b.switch(value.v, end)
    for k in cases:
        block = b.append_basic_block(f"case{k}")
        switch.add_case(I64(k), block)
        b.position_at_end(block)
        body(k)
        b.branch(end)
    b.position_at_end(end)


@instruction(I64)
def get(address: Value) -> Value:
    """The int64 at an address."""
    return Value(address.b, address.b.load(pointer(address, I64), typ=I64))


@instruction()
def put(address: Value, value: Value) -> None:
    """Store an int64."""
    address.b.store(value.v, pointer(address, I64))


@instruction(I64)
def claim(counter: Value) -> Value:
    """The next task: the int64 at an address, which other threads add to as well, before adding 1."""
    b = counter.b
    return Value(b, b.atomic_rmw("add", pointer(counter, I64), I64(1), "monotonic"))
