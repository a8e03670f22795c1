"""What `torch.save` writes: a zip file, or before torch 1.6 pickles with the storages behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cubn.health.files.archive import Archive
from cubn.health.files.pickles import Global, Opaque, load
from cubn.health.files.source import MOST, Held, Source, Stream
from cubn.health.files.tensors import NUMPY, Entry, itemsize
from cubn.health.files.torch_objects import Storage, calls, named
from cubn.health.files.tree import entries
from cubn.health.files.unreadable import UnreadableFile

MAGIC = 0x1950A86A20F9469CFC6C
"""The number that the first pickle of a file before torch 1.6 is."""

_HOW_TO_SAVE = "save the model's state_dict instead: torch.save(model.state_dict(), path)"


def of_zip(archive: Archive) -> Iterator[Entry]:
    """Of a zip file with a data.pkl; of a model that torch.jit saved, too."""
    pickled = next(name for name in archive.members if name.rpartition("/")[2] == "data.pkl")
    folder = pickled.removesuffix("data.pkl")
    order = archive.members.get(f"{folder}byteorder")

    def read(of: Storage, begin: int, length: int) -> bytes:
        member = archive.members.get(f"{folder}data/{of.key}")
        if member is None:
            raise UnreadableFile("a tensor of a batch norm is not in the file: it is damaged")
        return archive.read(member, begin, length)

    big_endian = order is not None and archive.read(order, 0, min(order.size, 8)) == b"big"
    data = archive.members[pickled]
    if data.size > MOST:
        raise UnreadableFile(f"its pickle has {data.size} bytes, more than any checkpoint's")
    root = load(Stream(Held(archive.read(data), archive.source.path)), calls(read, big_endian), named)
    return _found(root)


def of_pickles(source: Source) -> Iterator[Entry]:
    """Of a file in which pickles stand one behind another, and storages behind them."""
    stream = Stream(source)
    places: dict[str, tuple[int, int]] = {}
    sizes: dict[str, int] = {}

    def read(of: Storage, begin: int, length: int) -> bytes:
        at, size = places.get(of.key, (0, 0))
        if begin + length > size:
            raise UnreadableFile("a tensor of a batch norm reaches beyond its storage: it is damaged")
        return source.read(at + begin, length)

    def known(persistent_id: Any) -> Storage | Global:
        found = named(persistent_id)
        if isinstance(found, Storage) and found.dtype in NUMPY:
            sizes[found.key] = itemsize(found.dtype)
        return found

    made = calls(read)
    first = load(stream, made, known)
    if first != MAGIC:
        return _found(first)  # a pickle of Python's own, which may hold arrays of any library: those are opaque
    load(stream, made, known)  # the version of the protocol
    system = load(stream, made, known)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UnreadableFile(f"it is of a big-endian machine, before torch 1.6; load it with torch, and {_HOW_TO_SAVE}")
    root, keys = load(stream, made, known), load(stream, made, known)
    if not isinstance(keys, list):
        raise UnreadableFile("its list of storages is damaged")
    for key in keys:
        count = int.from_bytes(stream.read(8), "little", signed=True)
        size = sizes.get(key) if isinstance(key, str) else None
        if size is None:
            break  # of a type that is not known here: where the others are cannot be told
        places[key] = (stream.skip(count * size), count * size)
    return _found(root)


def _found(root: Any) -> Iterator[Entry]:
    """Its entries; an object in which there are none was not understood."""
    found = list(entries(root))
    if not found and isinstance(root, Opaque):
        raise UnreadableFile(f"it is an object of {str(root.made_by)[:80]} that is not understood; {_HOW_TO_SAVE}")
    return iter(found)
