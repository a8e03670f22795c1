"""A program: the vectors of a folder that Orbax wrote, by tensorstore. See `child`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore

MOST_OF_ONE, MOST_OF_ALL = 1 << 22, 1 << 24
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}


def vectors(folder: str) -> Iterator[tuple[str, Any]]:
    """Vectors and numbers among the arrays, by their dotted names."""
    whole = os.path.exists(os.path.join(folder, "manifest.ocdbt"))
    store = {"driver": "ocdbt", "base": f"file://{folder}/"} if whole else {"driver": "file", "path": f"{folder}/"}
    left = MOST_OF_ALL
    for key in tensorstore.KvStore.open(store).result().list().result():
        name, _, last = key.decode().rpartition("/")
        if last not in DRIVERS or not name:
            continue
        place = store | {"path": f"{store.get('path', '')}{name}/"}
        array = tensorstore.open({"driver": DRIVERS[last], "kvstore": place}, open=True, read=True).result()
        if array.ndim > 1 or array.size > min(left, MOST_OF_ONE):
            continue
        left -= array.size
        yield name, array.read().result()


def main(folder: str) -> None:
    found = dict(vectors(folder))
    dtypes = {name: array.dtype.name for name, array in found.items() if array.dtype.kind == "V"}
    plain = {name: array.view(f"u{array.dtype.itemsize}") if name in dtypes else array for name, array in found.items()}
    sys.stdout.buffer.write(json.dumps({"dtypes": dtypes}).encode() + b"\n")
    np.savez(sys.stdout.buffer, **plain)


if __name__ == "__main__":
    main(sys.argv[1])
