"""Any other library that speaks DLPack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cubn._arrays.capsules import host_copy, new_output, read
from cubn._arrays.library import Array, Library, Output
from cubn._arrays.memory import rounded, widened
from cubn._layout import Shape, Strides
from cubn.errors import message


class Foreign(Library):
    """A library cubn has never heard of, by `__dlpack__` and `from_dlpack`."""

    adopts = True

    def __init__(self, name: str, from_dlpack: Callable[[Any], Any] | None) -> None:
        self.name = name
        self._from_dlpack = from_dlpack

    def describe(self, x: Any, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        return read(x, argument, dtypes, self)

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        adopt = self._from_dlpack
        if adopt is None:
            raise TypeError(
                message("x's library", "have from_dlpack, to make outputs", self.name, "Pass out=.", function="cubn")
            )
        output, exporter = new_output(shape, strides, dtype, like.device, self)
        return Output(output, lambda: adopt(exporter))

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        return rounded(values, dtype)

    def finite(self, array: Array, axis: int) -> Any:
        return np.isfinite(self.to_numpy(array)).all(axis)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        return widened(host_copy(array), array.dtype)
