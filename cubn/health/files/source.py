"""Bytes of a file, at offsets that are checked before anything is read."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from cubn.health.files.unreadable import UnreadableFile

MOST = 1 << 26
"""Bytes of one piece: what a header, a pickle or a vector of a batch norm never comes near."""

_WINDOW = 1 << 14


class Source:
    """A file, or a part of it, opened to read a few pieces. Nothing is mapped, so a file may shrink meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._file).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes."""
        self.check(offset, length)
        if length > MOST:
            raise UnreadableFile(f"it has a piece of {length} bytes where {MOST} are the most that is read")
        os.lseek(self._file, offset, os.SEEK_SET)
        pieces, left = [], length
        while left:
            piece = os.read(self._file, left)
            if not piece:
                raise UnreadableFile("it became shorter while it was read")
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def check(self, offset: int, length: int) -> None:
        """That there are these bytes."""
        if offset < 0 or not 0 <= length <= self.size - offset:
            raise UnreadableFile(
                f"it ends before byte {offset + length}, which it refers to: it was cut, or is damaged"
            )


class Held(Source):
    """Bytes in memory that were read of a file."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.path = path
        self.size = len(data)
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        self.check(offset, length)
        return self._data[offset : offset + length]


class Stream:
    """A source read from one place to another, in small pieces; what is skipped is not read."""

    def __init__(self, source: Source, offset: int = 0, stop: int | None = None) -> None:
        self.source = source
        self.offset = offset
        self.stop = source.size if stop is None else stop
        if not 0 <= offset <= self.stop <= source.size:
            raise UnreadableFile("it has a part that reaches beyond the end: it was cut, or is damaged")
        self._window, self._begin = b"", offset

    @property
    def left(self) -> int:
        return self.stop - self.offset

    def read(self, length: int) -> bytes:
        """The next bytes."""
        at = self.offset - self._begin
        if not 0 <= at <= at + length <= len(self._window):  # which never reaches beyond the stop
            self._check(length)
            self._window = self.source.read(self.offset, min(max(length, _WINDOW), self.left))
            self._begin, at = self.offset, 0
        self.offset += length
        return self._window[at : at + length]

    def line(self) -> bytes:
        """The next bytes up to a line's end, without it."""
        begin = self.offset
        text = self.source.read(begin, min(_WINDOW, self.left))
        end = text.find(b"\n")
        if end < 0:
            raise UnreadableFile("it has a line without an end: it was cut, or is damaged")
        self.offset = begin + end + 1
        return text[:end]

    def skip(self, length: int) -> int:
        """Go on behind these bytes, and say where they begin."""
        self._check(length)
        begin = self.offset
        self.offset += length
        return begin

    def _check(self, length: int) -> None:
        if not 0 <= length <= self.left:
            raise UnreadableFile(
                f"it ends at byte {self.stop}, within a piece that it refers to: it was cut, or is damaged"
            )
