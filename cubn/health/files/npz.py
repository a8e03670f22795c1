"""npz: a zip file of arrays, each behind a header of its own; those that are pickled objects stay unread."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cubn.health.files.archive import Archive, Member
from cubn.health.files.tensors import NUMPY, Entry, Tensor, Value, itemsize
from cubn.health.files.unreadable import UnreadableFile

MOST_OF_HEADER = 1 << 16
MOST_OF_TEXT = 64

_HEADER = re.compile(
    rb"\{\s*'descr':\s*'(?P<descr>[^']{1,40})'\s*,\s*'fortran_order':\s*(?:True|False)\s*,"
    rb"\s*'shape':\s*\((?P<shape>[0-9, L]{0,400})\)\s*,?\s*\}\s*"
)
_NAMES = {code: name for name, code in NUMPY.items() if name != "bfloat16"}


def of(archive: Archive) -> Iterator[Entry]:
    """Every array with a simple type."""
    for member in archive.members.values():
        value = _value(archive, member)
        if value is not None:
            yield Entry("", member.name.removesuffix(".npy"), value)


def _value(archive: Archive, member: Member) -> Value:
    head = archive.read(member, 0, min(member.size, 12))
    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        raise UnreadableFile(f"{member.name[:80]!r} is no array: the file is damaged")
    wide = head[6] > 1  # of version 2 on, the length has 4 bytes
    length, begin = int.from_bytes(head[8 : 12 if wide else 10], "little"), 12 if wide else 10
    if length > MOST_OF_HEADER or begin + length > member.size:
        raise UnreadableFile(f"{member.name[:80]!r} has a header of {length} bytes: the file is damaged")
    found = _HEADER.fullmatch(archive.read(member, begin, length))
    if found is None:
        return None  # of records
    descr = found["descr"].decode("latin-1")
    shape = tuple(int(length[:18]) for length in re.findall(rb"\d+", found["shape"]))
    if descr[1:2] == "U" and shape == () and member.size - begin - length <= 4 * MOST_OF_TEXT:
        return archive.read(member, begin + length).decode("utf-32-be" if descr[0] == ">" else "utf-32-le", "replace")
    dtype = _NAMES.get(descr[1:], descr)
    return Tensor(dtype, shape, lambda: _bytes(archive, member, begin + length, dtype, shape), descr[0] == ">")


def _bytes(archive: Archive, member: Member, begin: int, dtype: str, shape: tuple[int, ...]) -> bytes:
    length = itemsize(dtype) * (shape[0] if shape else 1)
    if len(shape) > 1 or member.size != begin + length:
        raise UnreadableFile(f"{member.name[:80]!r} has {member.size - begin} bytes, which are not those of its shape")
    return archive.checked(member)[begin:]
