"""Protocol buffers on the wire: fields by their numbers, whose bytes are left where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cubn.health.files.source import Source, Stream
from cubn.health.files.unreadable import UnreadableFile

MOST_FIELDS = 4_000_000
MOST_OF_TEXT = 1024

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5


@dataclass
class Budget:
    """How many fields may still be read of a file."""

    left: int = MOST_FIELDS


@dataclass(frozen=True)
class Field:
    """One field: a number as it stands, or where its bytes are."""

    number: int
    wire: int
    value: int
    begin: int
    end: int


def fields(source: Source, begin: int, end: int, budget: Budget) -> Iterator[Field]:
    """The fields of a message."""
    stream = Stream(source, begin, end)
    while stream.left:
        budget.left -= 1
        if budget.left < 0:
            raise UnreadableFile(f"it has more than {MOST_FIELDS} fields, as no network has")
        tag = varint(stream)
        number, wire = tag >> 3, tag & 7
        value, at, length = 0, stream.offset, 0
        if wire == VARINT:
            value = varint(stream)
        elif wire in (FIXED_32, FIXED_64):
            value = int.from_bytes(stream.read(4 if wire == FIXED_32 else 8), "little")
        elif wire == BYTES:
            length = varint(stream)
            at = stream.skip(length)
        else:
            raise UnreadableFile("it is of no format that is known here, or it is damaged")
        if number == 0:
            raise UnreadableFile("it is of no format that is known here, or it is damaged")
        yield Field(number, wire, value, at, at + length)


def varint(stream: Stream) -> int:
    """A number of up to 64 bits, seven to a byte."""
    value = shift = 0
    while shift < 70:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1
        shift += 7
    raise UnreadableFile("it is of no format that is known here, or it is damaged")


def text(source: Source, field: Field) -> str:
    """A field as text; one that is too long for a name as none."""
    length = field.end - field.begin
    return "" if length > MOST_OF_TEXT else source.read(field.begin, length).decode("utf-8", "replace")
