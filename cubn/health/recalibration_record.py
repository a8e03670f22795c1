"""What a recalibration has pooled so far, and how it is written: into a file, or to other ranks."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from cubn._moments import Moments
from cubn.errors import message

VERSION = 1
"""Of the file's format."""


class Record(NamedTuple):
    """Moments of a recalibration under way; never changed, so that whoever interrupts it finds whole batches."""

    done: Mapping[str, Moments] = {}
    """By layer, of all batches and ranks."""
    pools: Mapping[str, tuple[Moments, ...]] = {}
    """By layer, of this rank's batches in the pass under way; one for each of the layer's calls in a forward."""
    batches: int = 0
    """That the pools are of."""
    all_batches: int = 0
    """Of a pass, on all ranks; 0 before the first is done."""

    def packed(self, about: Mapping[str, Any]) -> bytes:
        """An npz without pickled objects: everything, and what the caller says of it in words and numbers of JSON."""
        names = {
            "done": list(self.done),
            "pools": {name: len(pools) for name, pools in self.pools.items()},
            "batches": self.batches,
            "all_batches": self.all_batches,
        }
        written = json.dumps({"version": VERSION, "about": about, "record": names}, sort_keys=True)
        moments = [*self.done.values(), *(pool for pools in self.pools.values() for pool in pools)]
        entries = {f"{i}.{name}": entry for i, one in enumerate(moments) for name, entry in one.to_dict().items()}
        memory = io.BytesIO()
        np.savez(memory, header=np.array(written), **entries)
        return memory.getvalue()

    @classmethod
    def unpacked(cls, packed: bytes) -> tuple[Self, dict[str, Any]]:
        """A record, and what was said of it. A ValueError or KeyError if the bytes are no whole record."""
        try:
            with np.load(io.BytesIO(packed), allow_pickle=False) as entries:
                header = json.loads(str(entries["header"]))
                numbers = count()

                def following() -> Moments:
                    i = next(numbers)
                    names = ("start", "stop", "exact", "blocks", "count", "mean", "m2")
                    return Moments.from_dict({name: entries[f"{i}.{name}"] for name in names})

                if header["version"] != VERSION:
                    raise ValueError(f"version {header['version']}")
                names = header["record"]
                done = {name: following() for name in names["done"]}
                pools = {name: tuple(following() for _ in range(calls)) for name, calls in names["pools"].items()}
                return cls(done, pools, names["batches"], names["all_batches"]), header["about"]
        except (zipfile.BadZipFile, EOFError, TypeError, OSError) as error:
            raise ValueError(str(error)) from error


class RecordFile:
    """The file that a recalibration can be resumed from.

    It is replaced as a whole: whoever reads it, and whenever this process is killed, finds one record or the next.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(message("checkpoint", "be in a folder that exists", str(path)))
        self._about = json.loads(json.dumps(about))

    def read(self) -> Record:
        """What is there; an empty record where there is no file. Raises if it is not of this recalibration."""
        remedy = f"Delete {self.path}, or give another path."
        try:
            packed = self.path.read_bytes()
        except FileNotFoundError:
            return Record()
        try:
            record, about = Record.unpacked(packed)
        except (ValueError, KeyError) as error:
            rule = "be a file that recalibrate wrote"
            raise ValueError(message("checkpoint", rule, f"{self.path}, which is none ({error})", remedy)) from None
        different = [name for name in self._about if about.get(name) != self._about[name]]
        if different:
            rule = "be of this recalibration"
            got = f"{self.path}, of {about.get('subject')}, which differs in {', '.join(different)}"
            raise ValueError(message("checkpoint", rule, got, remedy))
        return record

    def write(self, record: Record) -> None:
        """Beside it first, and in its place when all of that is on the disk."""
        beside = self.path.with_name(f"{self.path.name}.tmp")
        try:
            with beside.open("wb") as file:
                file.write(record.packed(self._about))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)
        _sync_folder(self.path.parent)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk, too, where a folder can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
