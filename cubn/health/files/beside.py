"""Files that a file names, which must lie beside it."""

from __future__ import annotations

from pathlib import Path

from cubn.health.files.unreadable import UnreadableFile


def beside(path: Path, name: str) -> Path:
    """The file of this name in path's folder."""
    if not name or name in (".", "..") or any(sign in name for sign in "/\\:\0") or len(name) > 255:
        raise UnreadableFile(f"it names the file {name[:80]!r}, which is not one beside it")
    other = path.parent / name
    if not other.is_file():
        raise UnreadableFile(f"it needs {name[:80]!r} beside it, which is not there")
    return other
