"""Cores that this process may keep busy: by its affinity, and by what its control group is given of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cores() -> int:
    """At least 1. A container's limit (docker run --cpus=1.5, a Kubernetes limit) counts, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(max(1, math.ceil(quota)) for quota in quotas(Path("/")))])


def quotas(root: Path) -> Iterator[float]:
    """Of processor time a second, one for every control group around this process that has any."""
    for folder, files in _groups(root):
        for names in files:
            with contextlib.suppress(OSError, ValueError):
                words = " ".join((folder / name).read_text() for name in names).split()
                quota, period = map(int, words)  # "max" is no number, nor is -1 a quota
                if quota > 0 and period > 0:
                    yield quota / period


_V2 = (("cpu.max",),)
_V1 = (("cpu.cfs_quota_us", "cpu.cfs_period_us"),)
_Files = tuple[tuple[str, ...], ...]


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Folders of this process's control groups, and in which files they have a quota and its period."""
    try:
        lines = os.fsdecode((root / "proc/self/cgroup").read_bytes()).splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount, files = (root / "sys/fs/cgroup/cpu", _V1) if controllers else (root / "sys/fs/cgroup", _V2)
        relative = PurePosixPath(path.lstrip("/"))
        for inner in (relative, *relative.parents):
            yield mount / inner, files
