"""An index.json that says which tensors are in which files beside it."""

from __future__ import annotations

from pathlib import Path

from cubn.health.files.beside import beside
from cubn.health.files.source import Source
from cubn.health.files.text import parsed
from cubn.health.files.unreadable import UnreadableFile

MOST_OF_INDEX = 1 << 25
MOST_SHARDS = 4096


def names(source: Source) -> list[Path]:
    """The files, each once."""
    if source.size > MOST_OF_INDEX:
        raise UnreadableFile(f"it is an index of {source.size} bytes, more than any checkpoint's")
    index = parsed(source.read(0, source.size))
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UnreadableFile("it is JSON, but no index of shards")
    unique = sorted(set(files.values()))
    if len(unique) > MOST_SHARDS:
        raise UnreadableFile(f"it names {len(unique)} files, more than any checkpoint has")
    return [beside(source.path, name) for name in unique]
