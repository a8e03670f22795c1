"""JAX."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from cubn._arrays import dlpack
from cubn._arrays.capsules import LEGACY_STREAM, new_output, read
from cubn._arrays.library import Array, Library, Output
from cubn._arrays.memory import rounded
from cubn._arrays.numpy import NUMPY, dtype_name
from cubn._arrays.refusals import refuse, refuse_dtype
from cubn._layout import Shape, Strides
from cubn._types import HOST
from cubn._weak import Leases


class Jax(Library):
    """JAX, through its arrays' capsules. An array is never written: others may hold its memory."""

    name = "jax"
    immutable = True
    conversion = NUMPY.conversion
    adopts = True

    def __init__(self, jax: Any) -> None:
        self._jax = jax
        self._lent: dict[Any, Leases[Any]] = {}  # memory of GPUs, by JAX's device
        self._tick = functools.lru_cache(self._new_tick)

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
        device = like.owner.device
        if like.device != HOST:
            self._take_back(device)
        output, exporter = new_output(shape, strides, dtype, like.device, self)

        def finish() -> Any:
            y = self.adopt(exporter)
            return y if y.device == device else self._jax.device_put(y, device)

        return Output(output, finish)

    def adopt(self, exporter: dlpack.Exporter) -> Any:
        """A JAX array in the exporter's memory, new memory of ours."""
        is_wide = exporter.dtype in ("float64", "int64")  # of which JAX returns half the bits otherwise
        with self._jax.enable_x64(True) if is_wide else contextlib.nullcontext():
            y = self._jax.dlpack.from_dlpack(exporter)
        if exporter.__dlpack_device__() != HOST:
            self._lent_on(y.device).lend(exporter.buffer.data, exporter.buffer)
        return y

    def _lent_on(self, device: Any) -> Leases[Any]:
        return self._lent.get(device) or self._lent.setdefault(device, Leases())  # the same for all threads

    def _take_back(self, device: Any) -> None:
        """Let go of memory that JAX has dropped, behind what it had XLA do with it.

        XLA drops memory once the last reader is on its stream, not once that is done, and reads on a stream that nobody
        else knows. An array that it is told to make now is behind all of that, and the legacy default stream, where
        the memory is used next, waits for the array. See docs/decisions/0015-memory-that-jax-drops.md.
        """
        if ended := self._lent_on(device).ended():
            dlpack.export(self._tick(device)(), LEGACY_STREAM)
            del ended  # not before

    def _new_tick(self, device: Any) -> Callable[[], Any]:
        """A program of XLA's that makes a number; compiled, it runs even while something is traced."""
        jax = self._jax
        with jax.ensure_compile_time_eval():
            zero = jax.device_put(np.int32(0), device)
            program = jax.jit(lambda number: number + 1).lower(zero).compile()

        def tick() -> Any:
            with jax.disable_jit(False):
                return program(zero)

        return tick

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        with self._jax.enable_x64(dtype in ("float64", "int64")):
            return self._jax.device_put(rounded(values, dtype).astype(dtype, copy=False), like.owner.device)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        return np.array(array.owner, "float32" if array.dtype == "bfloat16" else None)

    def mark_written(self, *arrays: Any) -> None:
        raise TypeError("a JAX array is never written")
