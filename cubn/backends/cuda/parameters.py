"""What a kernel is launched with: the members of kernels/parameters.cuh's `Parameters`, by name."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Mapping
from typing import NamedTuple

from cubn._types import Operand, Vector
from cubn.backends.cuda import plan
from cubn.backends.cuda.source import folder

_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_CONSTANT = re.compile(r"^constexpr int (\w+) = (\d+);", re.MULTILINE)
_FIELD = re.compile(r"^ +(\w+|long long) (\w+)(?:\[(\w+)\])?;", re.MULTILINE)

FORMATS = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}

Fields = Mapping[str, int | float]


class Member(NamedTuple):
    """Where a member is."""

    word: int  # of 8 bytes, from the first
    is_double: bool


@functools.cache
def members() -> dict[str, Member]:
    """The members of Parameters by name, as `x.pointer` and `last.share.3`, in order; read from the header itself."""
    text = (folder() / "parameters.cuh").read_text(encoding="utf-8")
    structs = {name: _FIELD.findall(body) for name, body in _STRUCT.findall(text)}
    constants = {name: int(value) for name, value in _CONSTANT.findall(text)}
    found: dict[str, Member] = {}

    def lay_out(struct_name: str, prefix: str) -> None:
        for kind, name, extent in structs[struct_name]:
            places = [f"{prefix}{name}"]
            if extent:
                places = [f"{prefix}{name}.{i}" for i in range(constants[extent])]
            for place in places:
                if kind in structs:
                    lay_out(kind, f"{place}.")
                else:
                    found[place] = Member(len(found), kind == "double")

    lay_out("Parameters", "")
    return found


def pack(fields: Fields, words: bytes = b"") -> bytearray:
    """The bytes of a Parameters with these members, the others as in `words`, or 0."""
    known = members()
    block = bytearray(words or 8 * len(known))
    integers = memoryview(block).cast("q")
    for name, value in fields.items():
        word, is_double = known[name]
        if is_double:
            struct.pack_into("d", block, 8 * word, value)
        else:
            integers[word] = value  # type: ignore[assignment]
    return block


def of_vector(name: str, v: Vector | None) -> Fields:
    if v is None:
        return {}
    return {f"{name}.pointer": v.pointer, f"{name}.format": FORMATS[v.dtype], f"{name}.stride": v.stride}


def of_operand(name: str, o: Operand, vectors: bool) -> dict[str, int | float]:
    """An operand whose positions step as one; `vectors`: whether its octets begin at multiples of 16 bytes."""
    return {
        f"{name}.pointer": o.pointer,
        f"{name}.sample": o.sample_stride,
        f"{name}.channel": o.channel_stride,
        f"{name}.position": plan.position_step(o),
        f"{name}.vectors": int(vectors),
    }


def of_scattered(name: str, o: Operand) -> dict[str, int | float]:
    """An operand of any strides."""
    axes = range(len(o.position_shape))
    return {
        f"{name}.pointer": o.pointer,
        f"{name}.sample": o.sample_stride,
        f"{name}.channel": o.channel_stride,
        f"{name}.axes": len(axes),
        **{f"{name}.extent.{i}": o.position_shape[i] for i in axes},
        **{f"{name}.stride.{i}": o.position_strides[i] for i in axes},
    }
