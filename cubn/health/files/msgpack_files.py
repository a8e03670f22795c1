"""MessagePack as Flax writes it: nested mappings, whose arrays are extensions of type 1, and stay where they are."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from cubn.health.files.source import Source, Stream
from cubn.health.files.tensors import Entry, Tensor
from cubn.health.files.tree import MOST_OF_NAME, entries
from cubn.health.files.unreadable import UnreadableFile

MOST_ITEMS = 1_000_000
DEPTH = 64

_ARRAY = 1
_LENGTHS = {  # bytes of the length that follows the first byte
    **{0xC4 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xC7 + i: ("extension", 1 << i) for i in range(3)},
    **{0xD9 + i: ("text", 1 << i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("mapping", 2 << i) for i in range(2)},
}
_NUMBERS = {0xCA: ">f", 0xCB: ">d", **{0xCC + i: f">{'BHIQbhiq'[i]}" for i in range(8)}}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def of(source: Source) -> Iterator[Entry]:
    """The arrays of a file that is one mapping."""
    stream = Stream(source)
    root = _Reader(stream).value(0)
    if stream.left:
        raise UnreadableFile(f"it goes on behind its end, at byte {stream.offset}: it is damaged, or no MessagePack")
    return entries(root)


class _Reader:
    """Values of a stream, one by one."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.left = MOST_ITEMS

    def value(self, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > DEPTH:
            raise UnreadableFile(f"it has more than {MOST_ITEMS} values, or they are nested deeper than {DEPTH}")
        first = self.stream.read(1)[0]
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            form = _NUMBERS[first]
            return struct.unpack(form, self.stream.read(struct.calcsize(form)))[0]
        kind, length = self._kind(first)
        if kind == "text":
            return self._text(length)
        if kind == "bytes":
            return self.stream.skip(length) and None
        if kind == "extension":
            return self._extension(length)
        if kind == "list":
            return [self.value(depth + 1) for _ in range(length)]
        return {str(self._key(depth)): self.value(depth + 1) for _ in range(length)}

    def _kind(self, first: int) -> tuple[str, int]:
        if first < 0xC0:
            kind = "mapping" if first < 0x90 else "list" if first < 0xA0 else "text"
            return kind, first & (31 if kind == "text" else 15)
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4)
        if first not in _LENGTHS:
            raise UnreadableFile("it has a byte that MessagePack does not use: it is damaged")
        kind, size = _LENGTHS[first]
        return kind, int.from_bytes(self.stream.read(size), "big")

    def _key(self, depth: int) -> Any:
        key = self.value(depth + 1)
        if not isinstance(key, str | int):
            raise UnreadableFile("it has a mapping by other keys than names: it is no checkpoint of Flax")
        return key

    def _text(self, length: int) -> str:
        if length > MOST_OF_NAME:
            self.stream.skip(length)
            return ""
        return self.stream.read(length).decode("utf-8", "replace")

    def _extension(self, length: int) -> Tensor | None:
        """An array: its shape, the name of its type, and its bytes; other extensions are passed over."""
        kind = self.stream.read(1)[0]
        begin = self.stream.skip(length)
        if kind != _ARRAY:
            return None
        inner = Stream(self.stream.source, begin, begin + length)
        reader = _Reader(inner)
        if reader._kind(inner.read(1)[0]) != ("list", 3):
            raise UnreadableFile("it has an array that is damaged")
        shape, dtype = reader.value(DEPTH - 1), reader.value(DEPTH)
        kind_of_data, size = reader._kind(inner.read(1)[0])
        at = inner.skip(size)
        if not _is_shape(shape) or not isinstance(dtype, str) or kind_of_data != "bytes":
            raise UnreadableFile("it has an array that is damaged")
        return Tensor(dtype[:40], tuple(shape), lambda: self.stream.source.read(at, size))


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 64 and all(isinstance(n, int) and 0 <= n < 1 << 48 for n in shape)
