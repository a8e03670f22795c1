"""The file that a recalibration can be resumed from: an npz without pickled objects."""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cubn.errors import message
from cubn.health.recalibration.record import Record, Written


class RecordFile:
    """Replaced as a whole: whoever reads it, and whenever this process is killed, finds one record or the next.

    Parameters
    ----------
    path : path
    about : mapping
        What a record must say of itself to be of the same recalibration, in words and numbers of JSON.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(message("checkpoint", "be in a folder that exists", str(path)))
        self._about = json.loads(json.dumps(about))

    def read(self) -> Record:
        """What is there; an empty record where there is no file."""
        remedy = f"Delete {self.path}, or give another path."
        try:
            packed = self.path.read_bytes()
        except FileNotFoundError:
            return Record()
        try:
            record, about = Record.read(_unpacked(packed))
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            rule, got = "be a file that recalibrate wrote", f"{self.path}, which is none ({error})"
            raise ValueError(message("checkpoint", rule, got, remedy)) from None
        different = [name for name in self._about if about.get(name) != self._about[name]]
        if different:
            got = f"{self.path}, whose {' and '.join(different)} differ"
            raise ValueError(message("checkpoint", "be of the same recalibration", got, remedy))
        return record

    def write(self, record: Record) -> None:
        """Beside it first, and in its place when all of that is on the disk."""
        beside = self.path.with_name(f"{self.path.name}.tmp")
        try:
            with beside.open("wb") as file:
                file.write(_packed(record.written(self._about)))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)
        _sync_folder(self.path.parent)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


_PARSING = threading.Lock()
"""NumPy reads headers with Python's parser, which in Python 3.11 fails where several threads use it at once."""


def _packed(written: Written) -> bytes:
    memory = io.BytesIO()
    arrays: dict[str, Any] = {"header": np.array(written.header), **written.arrays}
    np.savez(memory, **arrays)
    return memory.getvalue()


def _unpacked(packed: bytes) -> Written:
    with _PARSING, np.load(io.BytesIO(packed), allow_pickle=False) as entries:
        arrays = {name: entries[name] for name in entries.files}
    return Written(str(arrays.pop("header")), arrays)


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk, too, where a folder can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
