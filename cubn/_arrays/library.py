"""What cubn asks of an array library, and what it then knows of an array."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from cubn._arrays import dlpack
from cubn._layout import Shape, Strides
from cubn._types import CPU

FLOATS = ("float16", "bfloat16", "float32", "float64")
BOOL = ("bool",)
COUNTS = ("int32", "int64")
NUMBERS = tuple(dlpack.CODES)
ITEMSIZE = {name: bits // 8 for name, (_, bits) in dlpack.CODES.items()}
HOST = (CPU, 0)


class Array(NamedTuple):
    """A described array: all that a backend needs of it, and what keeps it alive."""

    pointer: int  # address of the first element
    shape: Shape
    strides: Strides  # in elements
    dtype: str
    device: tuple[int, int]  # DLPack (type, index)
    writable: bool
    owner: Any  # the array itself
    library: Library
    capsule: object = None  # keeps the memory alive where the array alone might not


class Output(NamedTuple):
    """Memory to write, and what turns it into the library's own array once it is written."""

    array: Array
    finish: Callable[[], Any]


class Library(Protocol):
    """What cubn asks of an array library, and what most answer. `like` is always one of the library's own arrays."""

    name: str
    immutable: bool = False
    fixed: bool = False  # an array is the same memory, shape and type for life
    conversion: str = ""  # a sentence that says how `{0}` becomes an array of dtype `{1}`
    adopts: bool = False  # outputs are memory of ours, and `finish` calls the library, which may fail

    def describe(self, x: Any, function: str, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        """See `describe`."""

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        """Memory for an array on like's device."""

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        """A new array of these values, rounded once, on like's device; NumPy's own for a library cubn does not know
        (then of float32 in place of bfloat16).
        """

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy in host memory; bfloat16 comes, exactly, as float32."""

    def finite(self, array: Array, axis: int) -> Any:
        """Where all values along an axis are finite: an array of bool on the same device; else as `from_numpy`."""
        return (abs(array.owner) < math.inf).all(axis)

    def unchanged(self, array: Array) -> bool:
        """Whether the owner is as it was described: a yes is quick, a no may mean that one has to describe it again."""
        return False

    def version(self, array: Array) -> int | None:
        """A number that grows when the array is written in place, where the library counts that."""
        return None

    def mark_written(self, array: Array) -> None:
        """Tell the library that the array was written behind its back."""
        return
