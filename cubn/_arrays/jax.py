"""JAX."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from cubn._arrays import dlpack
from cubn._arrays.capsules import new_output, read
from cubn._arrays.library import Array, Library, Output
from cubn._arrays.memory import rounded
from cubn._arrays.numpy import NUMPY, dtype_name
from cubn._arrays.refusals import refuse, refuse_dtype
from cubn._layout import Shape, Strides


class Jax(Library):
    """JAX, through its arrays' capsules. An array is never written: others may hold its memory."""

    name = "jax"
    immutable = True
    conversion = NUMPY.conversion
    adopts = True

    def __init__(self, jax: Any) -> None:
        self._jax = jax

    def describe(self, x: Any, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        if x.is_deleted():
            refuse(x, argument, ValueError, "not be deleted", "a deleted array", "Donate a copy instead.")
        devices = len(x.sharding.device_set)
        if devices > 1:
            self._refuse_several(x, devices, argument)
        if not isinstance(x.dtype, np.dtype):  # a type of JAX's own, such as that of random keys
            refuse_dtype(x, str(x.dtype), dtypes, argument, "It holds no numbers.")
        dtype = dtype_name(x.dtype)
        if dtype not in dtypes:  # some have no capsule
            refuse_dtype(x, dtype, dtypes, argument, self.conversion)
        return read(x, argument, dtypes, self)

    def _refuse_several(self, x: Any, devices: int, argument: str) -> NoReturn:
        remedy = f"Pass {argument}.addressable_data(0)"
        if x.is_fully_replicated:
            remedy += ", which is the whole of it."
        elif x.is_fully_addressable:
            remedy = f"Pass jax.device_put({argument}, jax.devices()[0]), or one shard, {argument}.addressable_data(0)."
        else:
            remedy += ", the first shard that this process has."
        refuse(x, argument, ValueError, "be on one device", f"one on {devices} devices", remedy)

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        output, exporter = new_output(shape, strides, dtype, like.device, self)
        device = like.owner.device

        def finish() -> Any:
            y = self._adopt(exporter)
            return y if y.device == device else self._jax.device_put(y, device)

        return Output(output, finish)

    def _adopt(self, exporter: dlpack.Exporter) -> Any:
        """A JAX array in the exporter's memory."""
        if exporter.dtype != "float64":
            return self._jax.dlpack.from_dlpack(exporter)
        with self._jax.enable_x64(True):  # without it JAX returns float32
            return self._jax.dlpack.from_dlpack(exporter)

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        with self._jax.enable_x64(dtype in ("float64", "int64")):
            return self._jax.device_put(rounded(values, dtype).astype(dtype, copy=False), like.owner.device)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        return np.array(array.owner, "float32" if array.dtype == "bfloat16" else None)

    def mark_written(self, *arrays: Any) -> None:
        raise TypeError("a JAX array is never written")
