"""Any array in, the same library's array out.

NumPy, PyTorch and CuPy arrays are read through their own attributes, which is fastest; every other array through its
DLPack capsule. No library is imported here: a library whose array came in is in `sys.modules` already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NoReturn

import numpy as np

from cubn import _layout
from cubn._arrays.cupy import Cupy
from cubn._arrays.foreign import Foreign
from cubn._arrays.jax import Jax
from cubn._arrays.library import BOOL, FLOATS, NUMBERS, Array, Library, Output
from cubn._arrays.memory import addresses, overlap
from cubn._arrays.numpy import NUMPY
from cubn._arrays.refusals import refuse, refuse_stand_in, type_name
from cubn._arrays.torch import Torch

__all__ = [
    "BOOL",
    "FLOATS",
    "NUMBERS",
    "Array",
    "Library",
    "Output",
    "addresses",
    "check_writable",
    "describe",
    "destination",
    "empty_like",
    "empty_vector",
    "overlap",
]


def describe(x: Any, function: str, argument: str, dtypes: tuple[str, ...] = FLOATS, *, detach: bool = False) -> Array:
    """Describe any library's array without copying it.

    Parameters
    ----------
    x : array
        Of any library with `__dlpack__`.
    function, argument : str
        Whose argument this is, for messages.
    dtypes : tuple of str
        What is accepted.
    detach : bool
        Whether an array that requires a gradient is read as if it did not (it never is writable then), or refused.

    Raises
    ------
    TypeError
        Not an array; not of these dtypes; one that stands for numbers without holding them (a tracer), or that holds
        more than numbers (a mask, a unit, a gradient to come).
    ValueError
        A misaligned, deleted or multi-device array.
    NotImplementedError
        A device that is neither a CPU nor CUDA's.
    BufferError
        The array's library would not export it.
    """
    read = _DESCRIBERS.get(type(x)) or _describer(x, function, argument)
    return read(x, function, argument, dtypes, detach)


def empty_like(x: Array) -> Output:
    """An output of x's shape, dtype, device and library; of its layout too where x is dense, else C-contiguous."""
    return x.library.empty(x.shape, _layout.output_strides(x.shape, x.strides), x.dtype, x)


def empty_vector(features: int, dtype: str, like: Array) -> Output:
    """A per-channel output beside `like`, in its library."""
    return like.library.empty((features,), (1,), dtype, like)


def destination(out: Any, function: str, argument: str = "out") -> Output:
    """A caller's own array, to be written and given back."""
    array = describe(out, function, argument)
    check_writable(array, function, argument)

    def finish() -> Any:
        array.library.mark_written(array)
        return out

    return Output(array, finish)


def check_writable(array: Array, function: str, argument: str) -> None:
    """Raise unless the array can be written: TypeError for an immutable library, ValueError for this array alone."""
    wrong = partial(refuse, array, function, argument)
    if array.library.immutable:
        wrong(TypeError, "be an array that can be written", f"an immutable {array.library.name} array", "Leave it out.")
    if not array.writable and getattr(array.owner, "requires_grad", False):
        wrong(ValueError, "be writable", "a tensor that requires a gradient", "Pass it detached.")
    if not array.writable:
        wrong(ValueError, "be writable", "a read-only array", "Pass a copy.")
    if not _layout.is_distinct(array.shape, array.strides):
        got = f"elements that share memory, strides={array.strides}"
        wrong(ValueError, "have memory of its own for every element", got, "Pass a copy.")


_Describer = Callable[[Any, str, str, tuple[str, ...], bool], Array]
_DESCRIBERS: dict[type, _Describer] = {np.ndarray: NUMPY.describe, np.memmap: NUMPY.describe}


def _describer(x: Any, function: str, argument: str) -> _Describer:
    """Who describes arrays of x's type, on meeting the first one; an error if nobody does."""
    kind = type(x)
    torch, jax, cupy = (sys.modules.get(name) for name in ("torch", "jax", "cupy"))
    if isinstance(x, np.ndarray):
        _refuse_subclass(x, function, argument)
    if torch and isinstance(x, torch.Tensor):
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            refuse_stand_in(x, function, argument)
        found = _torch(torch).describe
    elif jax and isinstance(x, jax.Array):
        if isinstance(x, jax.core.Tracer):
            refuse_stand_in(x, function, argument)
        found = _jax(jax).describe
    elif cupy and isinstance(x, cupy.ndarray):
        found = _cupy(cupy).describe
    elif hasattr(kind, "__dlpack__"):
        found = _foreign(*_home(x)).describe
    else:
        remedy = f"Pass numpy.asarray({argument})."
        refuse(x, function, argument, TypeError, "be an array with __dlpack__", f"a {type_name(x)}", remedy)
    _DESCRIBERS[kind] = found
    return found


def _refuse_subclass(x: Any, function: str, argument: str) -> NoReturn:
    """Subclasses of NumPy's array mean more, or other, than their numbers: masks, units, matrix products."""
    masked = isinstance(x, np.ma.MaskedArray)
    plain = f"{argument}.data, and the valid positions as mask" if masked else f"numpy.asarray({argument})"
    refuse(x, function, argument, TypeError, "be a plain numpy.ndarray", f"a {type_name(x)}", f"Pass {plain}.")


def _home(x: Any) -> tuple[str, Callable[[Any], Any] | None]:
    """The name of x's library, and its from_dlpack."""
    name = type(x).__module__.partition(".")[0]
    namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else sys.modules.get(name)
    return name, getattr(namespace, "from_dlpack", None)


# one of each library
_torch, _jax, _cupy, _foreign = lru_cache(Torch), lru_cache(Jax), lru_cache(Cupy), lru_cache(Foreign)
