"""What files hold: tensors that are read when they are asked for, plain values, and their names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn.health.files.unreadable import UnreadableFile

Array = NDArray[Any]

NUMPY = {
    **{f"float{bits}": f"f{bits // 8}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)},
    "bfloat16": "u2",
    "bool": "b1",
}
"""NumPy's type that has a dtype's bytes; dtypes that are not here are named, never read."""


@dataclass(frozen=True)
class Tensor:
    """The type and shape of a tensor, and how its bytes are read: `load` gives them, dense, in C order.

    `load` is called for a tensor of a known dtype, once its size was found to be small.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], bytes] = field(repr=False)
    big_endian: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)

    def array(self) -> Array:
        """Its numbers; bfloat16 as the float32 it is the upper half of."""
        data = self.load()
        if len(data) != self.nbytes:
            raise UnreadableFile(f"a tensor of {self.nbytes} bytes has {len(data)}")
        flat = np.frombuffer(data, ("><"[not self.big_endian]) + NUMPY[self.dtype])
        if self.dtype == "bfloat16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return np.dtype(NUMPY[dtype]).itemsize


@dataclass(frozen=True)
class Unread:
    """What stands where running statistics would, and is no tensor that can be read."""

    kind: str


Value = Tensor | Unread | float | int | str | None
"""A tensor, or an option that stands beside tensors."""


@dataclass(frozen=True)
class Entry:
    """A value under its name in a collection: of several in one file (a model, its average), each has a name too."""

    collection: str
    name: str
    value: Value
