"""A program: the vectors of an HDF5 file, by h5py. See `child`."""

from __future__ import annotations

import io
import json
import sys
from typing import Any, BinaryIO

import h5py
import numpy as np

MOST_OF_ONE, MOST_OF_ALL = 1 << 22, 1 << 24
ADDRESSES = 4 << 30  # bytes of memory that this process may come to have


class Part(io.RawIOBase):
    """Bytes of a file from one place on, as a file."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.begin + self.at)
        data = self.file.read(max(0, min(len(buffer), self.length - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))


def vectors(file: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Vectors of floats that lie in this file itself, and the names that Keras gave the groups `vars`."""
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    left = MOST_OF_ALL

    def visit(path: str, item: Any) -> None:
        nonlocal left
        if isinstance(item, h5py.Group):
            name = item.attrs.get("name") if path.endswith("vars") else None
            if isinstance(name, str):
                names[path] = name
        elif item.ndim == 1 and item.dtype.kind == "f" and item.size <= MOST_OF_ONE:
            if item.external or item.is_virtual or item.size > left:
                return
            left -= item.size
            found[path] = item[...].astype(item.dtype.newbyteorder("="))

    file.visititems(visit)
    return found, names


def main(path: str, begin: int, length: int) -> None:
    limit_memory()
    with open(path, "rb") as raw, h5py.File(Part(raw, begin, length), "r") as file:
        found, names = vectors(file)
        config = file.attrs.get("model_config")
    config = config.decode() if isinstance(config, bytes) else config
    about = {"dtypes": {}, "names": names, "config": config if isinstance(config, str) else None}
    sys.stdout.buffer.write(json.dumps(about).encode() + b"\n")
    np.savez(sys.stdout.buffer, **found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
