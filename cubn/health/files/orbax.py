"""Orbax: a folder that tensorstore wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cubn.health.files import child
from cubn.health.files.tensors import Entry
from cubn.health.files.unreadable import UnreadableFile

_MARKS = ("manifest.ocdbt", "_METADATA")
MOST_FOLDERS = 4096


def of(folder: Path) -> Iterator[Entry]:
    """The arrays of the checkpoint that the folder is, or the only one in it."""
    found = _checkpoints(folder)
    if not found:
        raise UnreadableFile("it is a folder without a checkpoint of Orbax")
    if len(found) > 1:
        names = ", ".join(sorted(str(path.relative_to(folder)) for path in found)[:4])
        raise UnreadableFile(f"it has several checkpoints ({names}); name one of them")
    _, tensors = child.run("tensorstore", found[0])
    return (Entry("", name, tensor) for name, tensor in tensors.items())


def _checkpoints(folder: Path) -> list[Path]:
    """Folders that are checkpoints: this one, or those in it (steps, and their items)."""
    found, level = [], [folder]
    for _ in range(3):
        found += [path for path in level if any((path / mark).is_file() for mark in _MARKS)]
        if found:
            break
        inner = (path for parent in level for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
        level = [path for path, _ in zip(inner, range(MOST_FOLDERS), strict=False)]
    return found
