"""What a kernel is launched with: the members of kernels/parameters.cuh's `Parameters`, by name."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from cubn._types import VECTOR_CODES, Operand, Vector
from cubn.backends.cuda.plan import Fields, position_step
from cubn.backends.cuda.source import folder

_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_CONSTANT = re.compile(r"^constexpr int (\w+) = (\d+);", re.MULTILINE)
_FIELD = re.compile(r"^ +(\w+|long long) (\w+)(?:\[(\w+)\])?;", re.MULTILINE)

Values = tuple[Any, ...]
"""The addresses and numbers of a call."""


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


def pack(fields: Fields) -> bytearray:
    """The bytes of a Parameters with these members, the others 0."""
    known = members()
    block = bytearray(8 * len(known))
    for name, value in fields.items():
        word, is_double = known[name]
        struct.pack_into("d" if is_double else "q", block, 8 * word, value)
    return block


class Template:
    """A Parameters but for members that come from the values of a call.

    One `struct.pack_into` writes all of it: those members, and what is between them as bytes.
    """

    __slots__ = ("_between", "_pack_into", "_pick", "_size")

    def __init__(self, fields: Fields, places: Mapping[str, int]) -> None:
        """`places`: which of the values each of those members takes."""
        known = members()
        words = bytes(pack(fields))
        form, end = ["="], 0
        picked: list[int] = []
        between: list[bytes] = []

        def up_to(word: int) -> None:
            if word > end:
                form.append(f"{8 * (word - end)}s")
                picked.append(~len(between))
                between.append(words[8 * end : 8 * word])

        for (word, is_double), place in sorted((known[name], place) for name, place in places.items()):
            up_to(word)
            form.append("d" if is_double else "q")
            picked.append(place)
            end = word + 1
        up_to(len(known))
        self._size = len(words)
        self._pack_into = struct.Struct("".join(form)).pack_into
        self._between = tuple(reversed(between))  # behind the values, of any number: counted from the end
        self._pick = itemgetter(*picked)

    def filled(self, values: Values) -> bytearray:
        block = bytearray(self._size)
        self._pack_into(block, 0, *self._pick(values + self._between))
        return block


def of_vector(name: str, v: Vector | None) -> Fields:
    """But for the pointer."""
    return {f"{name}.format": VECTOR_CODES[v.dtype], f"{name}.stride": v.stride} if v else {}


def of_operand(name: str, o: Operand, vectors: bool) -> Fields:
    """An operand whose positions step as one, but for the pointer; `vectors`: whether its octets begin at multiples of
    16 bytes.
    """
    return {
        f"{name}.sample": o.sample_stride,
        f"{name}.channel": o.channel_stride,
        f"{name}.position": position_step(o),
        f"{name}.vectors": int(vectors),
    }


def of_scattered(name: str, o: Operand) -> Fields:
    """An operand of any strides, but for the pointer."""
    axes = range(len(o.position_shape))
    return {
        f"{name}.sample": o.sample_stride,
        f"{name}.channel": o.channel_stride,
        f"{name}.axes": len(axes),
        **{f"{name}.extent.{i}": o.position_shape[i] for i in axes},
        **{f"{name}.stride.{i}": o.position_strides[i] for i in axes},
    }
