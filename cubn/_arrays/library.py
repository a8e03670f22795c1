"""What cubn asks of an array library, and what it then knows of an array."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from cubn._layout import Shape, Strides

Layout: TypeAlias = tuple[Any, ...]
"""Of a library's arrays, equal for those with the same shape, strides, dtype, device and remainder of the address by
`ALIGNMENT`: what has been found out about one is true of the others.
"""

ALIGNMENT = 16

Allocate: TypeAlias = Callable[[Any], tuple[Any, int]]


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

    def nowhere(self) -> Array:
        """All of it that other arrays may share."""
        return self._replace(pointer=0, owner=None, capsule=None)


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
    counts_versions: bool = False  # of what is written to an array
    adopts: bool = False  # outputs are memory of ours, and `finish` calls the library, which may fail

    def describe(self, x: Any, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        """See `describe`."""

    def signature(self, x: Any) -> tuple[Layout, int] | None:
        """x's layout and address, found quickly; None where x has to be described, since it may not be in order."""
        return None

    def is_still(self, x: Any, layout: Layout, pointer: int) -> bool:
        """Whether an array that had this layout can be read there again: the same memory, and as many elements."""
        return self.signature(x) == (layout, pointer)

    def layout(self, array: Array) -> Layout | None:
        """The layout that `signature` gives for arrays like one that was described."""
        return None

    def allocator(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Allocate:
        """`empty` for many calls: a function of an array like `like`, for an array beside it and its address. It is
        called where an array of the library has just had a signature.
        """
        like = like.nowhere()

        def allocate(x: Any) -> tuple[Any, int]:
            y = self.empty(shape, strides, dtype, like._replace(owner=x)).array
            return y.owner, y.pointer

        return allocate

    def writable(self, x: Any) -> bool:
        """Whether an array that has a signature can be written."""
        return True

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

    def watch(self, arrays: Iterable[Array]) -> Callable[[], bool]:
        """Of vectors: whether their owners are as they were described. A yes is quick, a no may mean that one has to
        describe them again.
        """
        return lambda: False

    def count(self, mask: Any) -> int:
        """How many values of a mask on the host, one that has a signature, are True."""
        return int(np.count_nonzero(mask))

    def version(self, x: Any) -> int | None:
        """A number that grows when the array is written in place, where the library counts that."""
        return None

    def mark_written(self, *arrays: Any) -> None:
        """Tell the library that arrays were written behind its back."""
        return
