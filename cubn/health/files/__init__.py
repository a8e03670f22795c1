"""Batch norms of checkpoint files, read as data: the format is told by the content, nothing in a file is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from cubn.health.files import (
    keras_files,
    msgpack_files,
    npz,
    onnx_files,
    orbax,
    safetensors_files,
    shards,
    torch_files,
)
from cubn.health.files.archive import Archive
from cubn.health.files.grouping import layers
from cubn.health.files.source import Source
from cubn.health.files.tensors import Entry
from cubn.health.files.unreadable import UnreadableFile
from cubn.health.layer import Layer

__all__ = ["UnreadableFile", "read"]

_HDF5 = b"\x89HDF\r\n\x1a\n"


def read(path: str | os.PathLike[str]) -> list[Layer]:
    """The batch norms of a checkpoint file, or of a folder that Orbax wrote.

    torch (zip files, and those before torch 1.6), safetensors, npz, Flax's MessagePack, ONNX, Keras and Orbax; an
    index.json of shards is read with its shards. Only batch norms are read, so that the size of a file does not matter.

    Parameters
    ----------
    path : path
        Of the file or folder. Its name does not say the format.

    Returns
    -------
    list of Layer
        In the file's order; empty if there are no batch norms in it. What the file does not say is None: torch's
        state_dicts have neither eps nor momentum.

    Raises
    ------
    UnreadableFile
        If the file is not there, damaged, hostile, or of no known format, or a package is missing that it needs.

    Notes
    -----
    Pickles are read by a machine that can call nothing. Every length and offset is compared with the file's size before
    it is used, and a file's batch norms have 2²⁴ values at most, so that memory is bounded. HDF5 and Orbax are read by
    h5py and tensorstore in a process of its own.
    """
    path = Path(path)
    try:
        with ExitStack() as opened:
            return layers(_entries(path, opened), path.name.partition(".")[0])
    except (OSError, MemoryError) as error:
        raise UnreadableFile(getattr(error, "strerror", None) or str(error) or "there is no memory for it") from error


def _entries(path: Path, opened: ExitStack, *, is_shard: bool = False) -> Iterator[Entry]:
    if path.is_dir():
        return orbax.of(path)
    if path.exists() and not path.is_file():
        raise UnreadableFile("it is no file")
    source = opened.enter_context(Source(path))
    begin = source.read(0, min(16, source.size))
    if not begin:
        raise UnreadableFile("it is empty")
    if begin.startswith(b"PK\3\4"):
        return _of_zip(Archive(source))
    if (
        not is_shard and begin.startswith(b"{") and b"\0" not in begin[:8]
    ):  # safetensors begins with a length, whose last bytes are 0
        return (entry for name in shards.names(source) for entry in _entries(name, opened, is_shard=True))
    return _reader(begin)(source)


def _reader(begin: bytes) -> Callable[[Source], Iterator[Entry]]:
    """What reads a file that begins like this and is no zip file."""
    if begin.startswith(_HDF5):
        return keras_files.of_h5
    if begin[8:9] == b"{":
        return safetensors_files.of
    if begin[0] == 0x80 and begin[1:2] in b"\2\3\4\5":
        return torch_files.of_pickles
    if begin[0] & 0xF0 == 0x80 or begin[0] in (0xDE, 0xDF):
        return msgpack_files.of
    return onnx_files.of


def _of_zip(archive: Archive) -> Iterator[Entry]:
    names = archive.members
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return torch_files.of_zip(archive)
    if keras_files.WEIGHTS in names and "config.json" in names:
        return keras_files.of_zip(archive)
    if names and all(name.endswith(".npy") for name in names):
        return npz.of(archive)
    raise UnreadableFile("it is a zip file, but none of torch, NumPy or Keras")
