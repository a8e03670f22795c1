"""The memory of described arrays: where it lies, what shares it, and what NumPy sees there."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np

from cubn import _layout
from cubn._arrays.library import Array
from cubn._layout import Strides
from cubn._types import ITEMSIZE


def overlap(a: Array, b: Array) -> Literal["none", "same", "partial"]:
    """Whether two arrays share memory: no, element for element, or otherwise (in doubt, otherwise)."""
    if a.device != b.device:
        return "none"
    low_a, high_a = addresses(a)
    low_b, high_b = addresses(b)
    if high_a <= low_b or high_b <= low_a:
        return "none"
    if (a.pointer, a.shape, a.dtype) == (b.pointer, b.shape, b.dtype) and all(
        extent == 1 or stride_a == stride_b
        for extent, stride_a, stride_b in zip(a.shape, a.strides, b.strides, strict=True)
    ):
        return "same"
    try:
        shared = np.shares_memory(view(a), view(b), max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        shared = True
    return "partial" if shared else "none"


def addresses(array: Array) -> tuple[int, int]:
    """The lowest address the array uses and one past the highest; nothing without elements."""
    low, high = _layout.span(array.shape, array.strides)
    size = ITEMSIZE[array.dtype]
    return array.pointer + low * size, array.pointer + high * size


class _Interface:
    """NumPy's array interface over a described array."""

    def __init__(self, array: Array) -> None:
        size = ITEMSIZE[array.dtype]
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "data": (array.pointer, True),
            "shape": array.shape,
            "strides": in_bytes(array.strides, size),
            "typestr": storage(array.dtype).str,
        }


def view(array: Array) -> np.ndarray[Any, Any]:
    """The memory under NumPy's eyes, read-only; bfloat16 as its bits."""
    return np.asarray(_Interface(array))


def storage(dtype: str) -> np.dtype[Any]:
    """A NumPy dtype that holds this one's bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def widened(bits: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """What is in `storage`, as numbers: bfloat16, exactly, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits


@np.errstate(all="ignore")
def rounded(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The values, rounded once, so that a library has nothing left to round: those of bfloat16 in float32."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    beyond, inexact = abs(near) > abs(values), near != values
    odd = np.where(
        inexact, (bits - beyond) | 1, bits
    )  # towards 0, with a last bit that says so: the next step is right
    even = odd + (0x7FFF + (odd >> 16 & 1)) & 0xFFFF0000
    return np.where(np.isnan(near), near, even.view(np.float32))


@lru_cache(maxsize=1024)
def in_bytes(strides: Strides, size: int) -> Strides:
    return tuple(stride * size for stride in strides)
