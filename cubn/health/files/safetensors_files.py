"""safetensors: a header of JSON, and behind it the tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from cubn.health.files.source import Source
from cubn.health.files.tensors import NUMPY, Entry, Tensor, itemsize
from cubn.health.files.text import parsed
from cubn.health.files.unreadable import UnreadableFile

MOST_OF_HEADER = 1 << 25

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def of(source: Source) -> Iterator[Entry]:
    """Every tensor that the header names."""
    header, begin = _header(source)
    ranges = []
    for name, about in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, first, last = _checked(name, about)
        if last > source.size - begin:
            raise UnreadableFile(f"{name[:80]!r} reaches beyond its end: it was cut, or is damaged")
        ranges.append((first, last))
        yield Entry("", name, Tensor(dtype, shape, partial(source.read, begin + first, last - first)))
    _check_apart(ranges)


def _header(source: Source) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(source.read(0, 8), "little")
    if length > min(MOST_OF_HEADER, source.size - 8):
        raise UnreadableFile(f"it has a header of {length} bytes: it was cut, or is damaged")
    header = parsed(source.read(8, length))
    if not isinstance(header, dict):
        raise UnreadableFile("its header is no mapping: it is damaged")
    return header, 8 + length


def _checked(name: str, about: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, and from where to where in the data."""
    match about:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            whole = all(isinstance(length, int) and 0 <= length < 1 << 48 for length in shape) and len(shape) <= 64
            if whole and 0 <= first <= last:
                dtype = DTYPES.get(kind, kind.lower()[:40])
                if dtype in NUMPY and math.prod(shape) * itemsize(dtype) != last - first:
                    raise UnreadableFile(f"{name[:80]!r} has {last - first} bytes, which are not those of its shape")
                return dtype, tuple(shape), first, last
    raise UnreadableFile(f"its header is wrong about {name[:80]!r}: it is damaged")


def _check_apart(ranges: list[tuple[int, int]]) -> None:
    """That no two tensors share bytes."""
    reached = 0
    for first, last in sorted(ranges):
        if first < reached and last > first:
            raise UnreadableFile("two of its tensors overlap: it is damaged")
        reached = max(reached, last)
