"""A zip file's members, by a directory that is checked before it is believed."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from cubn.health.files.source import MOST, Source
from cubn.health.files.unreadable import UnreadableFile

MOST_OF_DIRECTORY = 1 << 24
"""Bytes: a hundred thousand members with long names."""

_END, _END_64, _LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_MEMBER, _LOCAL = b"PK\1\2", b"PK\3\4"
_UNKNOWN = 0xFFFFFFFF
STORED, DEFLATED = 0, 8


@dataclass(frozen=True)
class Member:
    """Where a member is, and how it is kept."""

    name: str
    method: int
    encrypted: bool
    crc: int
    packed: int
    size: int
    header: int


class Archive:
    """The members of a zip file, by name."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.members = {member.name: member for member in _directory(source)}

    def offset(self, member: Member) -> int:
        """Where a member's bytes begin."""
        head = self.source.read(member.header, 30)
        if head[:4] != _LOCAL:
            raise UnreadableFile(f"its directory is wrong about {_quoted(member.name)}: it is damaged")
        name, extra = struct.unpack_from("<HH", head, 26)
        return int(member.header + 30 + name + extra)

    def read(self, member: Member, begin: int = 0, length: int | None = None) -> bytes:
        """Bytes of a member as they were before they were packed; all of them, and none that a packer made up."""
        length = member.size - begin if length is None else length
        if not 0 <= begin <= begin + length <= member.size:
            raise UnreadableFile(f"{_quoted(member.name)} has {member.size} bytes, fewer than it is said to")
        if begin + length > MOST and member.method != STORED:
            raise UnreadableFile(f"{_quoted(member.name)} is packed, and too large to be unpacked here")
        if member.encrypted or member.method not in (STORED, DEFLATED):
            raise UnreadableFile(f"{_quoted(member.name)} is encrypted or packed in an unknown way")
        offset = self.offset(member)
        if member.method == STORED:
            if member.packed != member.size:
                raise UnreadableFile(f"its directory contradicts itself about {_quoted(member.name)}: it is damaged")
            return self.source.read(offset + begin, length)
        return self._unpacked(member, offset, begin + length)[begin:]

    def checked(self, member: Member) -> bytes:
        """All of a member, whose checksum must be right."""
        data = self.read(member)
        if zlib.crc32(data) != member.crc:
            raise UnreadableFile(f"the checksum of {_quoted(member.name)} is wrong: it is damaged")
        return data

    def _unpacked(self, member: Member, offset: int, length: int) -> bytes:
        """The first bytes, of which no more come to be than these."""
        unpacker, pieces, made, read = zlib.decompressobj(-15), [], 0, 0
        try:
            while made < length:
                waiting = unpacker.unconsumed_tail
                if not waiting:
                    step = min(1 << 16, member.packed - read)
                    if step <= 0:
                        break
                    waiting = self.source.read(offset + read, step)
                    read += step
                pieces.append(unpacker.decompress(waiting, length - made))
                made += len(pieces[-1])
                if unpacker.eof:
                    break
        except zlib.error as error:
            raise UnreadableFile(f"{_quoted(member.name)} cannot be unpacked: it is damaged") from error
        if made != length:
            raise UnreadableFile(f"{_quoted(member.name)} has fewer bytes than it is said to: it is damaged")
        return b"".join(pieces)


def _directory(source: Source) -> list[Member]:
    count, size, offset = _end(source)
    if size > MOST_OF_DIRECTORY or 46 * count > size:
        raise UnreadableFile(f"it has a directory of {size} bytes for {count} members, which is no checkpoint's")
    data, at, members = source.read(offset, size), 0, []
    for _ in range(count):
        if len(data) - at < 46 or data[at : at + 4] != _MEMBER:
            raise UnreadableFile("its directory is damaged")
        flags, method, _, _, crc, packed, full, name, extra, note, _, _, _, header = struct.unpack_from(
            "<HHHHIIIHHHHHII", data, at + 8
        )
        begin = at + 46
        at = begin + name + extra + note
        if at > len(data):
            raise UnreadableFile("its directory is damaged")
        text = data[begin : begin + name].decode("utf-8", "replace")
        full, packed, header = _wide(data[begin + name : begin + name + extra], full, packed, header)
        members.append(Member(text, method, bool(flags & 1), crc, packed, full, header))
    return members


def _end(source: Source) -> tuple[int, int, int]:
    """How many members the directory has, its bytes, and where it is."""
    begin = max(0, source.size - 22 - 0xFFFF)
    tail = source.read(begin, source.size - begin)
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise UnreadableFile("it begins as a zip file and has no end of one: it was cut, or is damaged")
    count, size, offset = struct.unpack_from("<HII", tail, at + 10)
    locator = begin + at - 20
    if locator >= 0 and source.read(locator, 4) == _LOCATOR_64:
        (where,) = struct.unpack("<Q", source.read(locator + 8, 8))
        end = source.read(where, 56)
        if end[:4] != _END_64:
            raise UnreadableFile("the end of its zip file is damaged")
        count, size, offset = struct.unpack_from("<QQQ", end, 32)
    return count, size, offset


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Sizes and offset, of which those beyond 32 bits are in the extra field."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    values = []
    for field in fields:
        if field == _UNKNOWN and len(wide) >= 8:
            (field,), wide = struct.unpack_from("<Q", wide), wide[8:]
        values.append(field)
    return values


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")
