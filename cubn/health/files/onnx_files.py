"""ONNX: the nodes that are batch norms, and the initialisers that they take."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cubn.health.files.beside import beside
from cubn.health.files.protobuf import BYTES, FIXED_32, VARINT, Budget, Field, fields, text, varint
from cubn.health.files.source import MOST, Source, Stream
from cubn.health.files.tensors import Entry, Tensor, Value, itemsize
from cubn.health.files.unreadable import UnreadableFile

DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    17: "float8_e4m3fn",
    19: "float8_e5m2",
}
ROLES = ("gamma", "beta", "running_mean", "running_var")
"""Inputs of a BatchNormalization behind x."""

EPSILON, MOMENTUM = 1e-5, 0.9
"""What a node has that does not say; the momentum is the weight of the old value."""

_IR_VERSION, _GRAPH, _OPSETS = 1, 7, 8  # of a model
_NODE, _INITIALIZER = 1, 5  # of a graph


@dataclass
class _Node:
    """A node, as far as batch norms need it."""

    name: str = ""
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    tensor: Tensor | None = None


def of(source: Source) -> Iterator[Entry]:
    """The batch norms of the model's graph, under cubn's names."""
    budget = Budget()
    model = list(fields(source, 0, source.size, budget))
    graphs = [f for f in model if f.number == _GRAPH and f.wire == BYTES]
    if not graphs or not {_IR_VERSION, _OPSETS} <= {f.number for f in model}:
        raise UnreadableFile("it is of no format that is known here, or it is damaged")
    tensors: dict[str, Tensor] = {}
    norms: list[_Node] = []
    for part in fields(source, graphs[0].begin, graphs[0].end, budget):
        if part.number == _INITIALIZER and part.wire == BYTES:
            name, tensor = _tensor(source, part, budget)
            tensors[name] = tensor
        elif part.number == _NODE and part.wire == BYTES:
            node = _node(source, part, budget)
            if node.operator == "BatchNormalization":
                norms.append(node)
            elif node.operator == "Constant" and node.tensor is not None:
                tensors.update(dict.fromkeys(node.outputs, node.tensor))
            elif node.operator == "Identity" and node.inputs and node.inputs[0] in tensors:
                tensors.update(dict.fromkeys(node.outputs, tensors[node.inputs[0]]))
    for node in norms:
        yield from _entries(node, tensors)


def _entries(node: _Node, tensors: dict[str, Tensor]) -> Iterator[Entry]:
    layer = _layer(node)
    values: dict[str, Value] = {
        role: tensors[name] for role, name in zip(ROLES, node.inputs[1:5], strict=False) if name in tensors
    }
    values["eps"] = _shortest(node.numbers.get("epsilon", EPSILON))
    values["momentum"] = round(1 - _shortest(node.numbers.get("momentum", MOMENTUM)), 9)
    values["running_variance"] = "biased"
    for name, value in values.items():
        yield Entry("", f"{layer}.{name}", value)


def _layer(node: _Node) -> str:
    """The name of the module whose running mean it is, or else the node's own."""
    mean = node.inputs[3] if len(node.inputs) > 3 else ""
    module, found, _ = mean.rpartition(".running_mean")
    return module if found else node.name or next(iter(node.outputs), "") or mean


def _shortest(x: float) -> float:
    """The float32 as it was written in decimals: 0.9, not 0.8999999761581421."""
    return float(str(np.float32(x)))


def _node(source: Source, message: Field, budget: Budget) -> _Node:
    node = _Node()
    for part in fields(source, message.begin, message.end, budget):
        if part.wire != BYTES:
            continue
        if part.number == 1:
            node.inputs.append(text(source, part))
        elif part.number == 2:
            node.outputs.append(text(source, part))
        elif part.number == 3:
            node.name = text(source, part)
        elif part.number == 4:
            node.operator = text(source, part)
        elif part.number == 5:
            _attribute(source, part, node, budget)
    return node


def _attribute(source: Source, message: Field, node: _Node, budget: Budget) -> None:
    name, number, tensor = "", None, None
    for part in fields(source, message.begin, message.end, budget):
        if part.number == 1 and part.wire == BYTES:
            name = text(source, part)
        elif part.number == 2 and part.wire == FIXED_32:
            (number,) = struct.unpack("<f", part.value.to_bytes(4, "little"))
        elif part.number == 5 and part.wire == BYTES:
            _, tensor = _tensor(source, part, budget)
    if number is not None:
        node.numbers[name] = number
    if name == "value" and tensor is not None:
        node.tensor = tensor


def _tensor(source: Source, message: Field, budget: Budget) -> tuple[str, Tensor]:
    """A tensor and its name; its numbers stand as bytes, as floats, as doubles, as integers, or in another file."""
    shape: list[int] = []
    name, kind, data = "", 0, None
    elsewhere: dict[str, str] = {}
    for part in fields(source, message.begin, message.end, budget):
        if part.number == 1:
            shape += [part.value] if part.wire == VARINT else _varints(source, part)
        elif part.number == 2 and part.wire == VARINT:
            kind = part.value
        elif part.number == 8 and part.wire == BYTES:
            name = text(source, part)
        elif part.number in (4, 5, 7, 9, 10) and part.wire == BYTES:
            data = part
        elif part.number == 13 and part.wire == BYTES:
            elsewhere |= _pair(source, part, budget)
    if len(shape) > 64 or any(length >= 1 << 48 for length in shape):
        raise UnreadableFile("it has a tensor of an impossible shape: it is damaged")
    dtype = DTYPES.get(kind, f"onnx type {kind}")

    def load() -> bytes:
        if elsewhere:
            return _external(source, elsewhere)
        if data is None:
            return b""
        if data.number in (5, 7):
            return b"".join((n % (1 << 64)).to_bytes(8, "little")[: itemsize(dtype)] for n in _varints(source, data))
        return source.read(data.begin, data.end - data.begin)

    return name, Tensor(dtype, tuple(shape), load)


def _varints(source: Source, packed: Field) -> list[int]:
    if packed.wire != BYTES or packed.end - packed.begin > MOST >> 3:
        raise UnreadableFile("it has a list of numbers that is damaged, or too long")
    stream, values = Stream(source, packed.begin, packed.end), []
    while stream.left:
        values.append(varint(stream))
    return values


def _pair(source: Source, message: Field, budget: Budget) -> dict[str, str]:
    texts = {part.number: text(source, part) for part in fields(source, message.begin, message.end, budget)}
    return {texts.get(1, ""): texts.get(2, "")}


def _external(source: Source, where: dict[str, str]) -> bytes:
    """Bytes of a file that lies beside the model's."""
    offset, length = where.get("offset", "0"), where.get("length", "")
    if not (offset.isdecimal() and length.isdecimal() and len(offset + length) < 40):
        raise UnreadableFile("it does not say where in another file a tensor is")
    with Source(beside(source.path, where.get("location", ""))) as other:
        return other.read(int(offset), int(length))
