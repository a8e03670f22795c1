"""The processor's last cache, as the operating system describes it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux; the C library's own answer is wrong on some processors
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Cache(NamedTuple):
    """Its size, and how many processors share it."""

    nbytes: int
    processors: int


UNKNOWN = Cache(32 << 20, 8)
"""Where the system does not say: that of many servers and desktops since 2019."""


@functools.cache
def last_level(folder: Path = FOLDER) -> Cache:
    """The cache before memory, of the first processor."""
    try:
        return max(
            (int((index / "level").read_text()), _cache(index))
            for index in folder.glob("index*")
            if (index / "type").read_text().strip() != "Instruction"
        )[1]
    except (OSError, ValueError, KeyError):
        return UNKNOWN


def _cache(index: Path) -> Cache:
    size = (index / "size").read_text().strip()
    return Cache(int(size[:-1]) * UNITS[size[-1]], _count((index / "shared_cpu_list").read_text()))


def _count(processors: str) -> int:
    """How many a list like `0-3,8,10-11` has."""
    ranges = [[int(end) for end in part.split("-")] for part in processors.split(",")]
    return sum(ends[-1] - ends[0] + 1 for ends in ranges)
