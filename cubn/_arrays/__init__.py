"""Any array in, the same library's array out.

NumPy, PyTorch and CuPy arrays are read through their own attributes, which is fastest; every other array through its
DLPack capsule. No library is imported here: a library whose array came in is in `sys.modules` already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from cubn import _layout
from cubn._arrays.cupy import Cupy
from cubn._arrays.dlpack import Exporter
from cubn._arrays.foreign import Foreign
from cubn._arrays.jax import Jax
from cubn._arrays.library import Array, Layout, Library, Output
from cubn._arrays.memory import addresses, overlap
from cubn._arrays.numpy import NUMPY, Headers
from cubn._arrays.refusals import refuse, refuse_non_array, refuse_stand_in, refuse_subclass
from cubn._arrays.torch import Torch
from cubn._types import BOOL, COUNTS, FLOATS, NUMBERS
from cubn.errors import a_type

__all__ = [
    "BOOL",
    "COUNTS",
    "FLOATS",
    "NUMBERS",
    "SIGNATURES",
    "Array",
    "Headers",
    "Layout",
    "Library",
    "Output",
    "addresses",
    "check_writable",
    "describe",
    "destination",
    "empty_like",
    "empty_vector",
    "overlap",
    "taken_over",
]


def describe(x: Any, argument: str, dtypes: tuple[str, ...] = FLOATS, *, detach: bool = False) -> Array:
    """Describe any library's array without copying it.

    Parameters
    ----------
    x : array
        Of any library with `__dlpack__`.
    argument : str
        Which argument this is, for messages.
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
        A misaligned, deleted or multi-device array, or one that reaches beyond its memory, as far as that is told.
    NotImplementedError
        A device that is neither a CPU nor CUDA's.
    BufferError
        The array's library would not export it, or its capsule makes no sense.
    """
    read = _DESCRIBERS.get(type(x)) or _describer(x, argument)
    try:
        return read(x, argument, dtypes, detach)
    except _layout.Unaddressable as error:
        reason = str(error)
    refuse(x, argument, ValueError, "fit in memory", reason, "")


def empty_like(x: Array) -> Output:
    """An output of x's shape, dtype, device and library; of its layout too where x is dense, else C-contiguous."""
    return x.library.empty(x.shape, _layout.output_strides(x.shape, x.strides), x.dtype, x)


def empty_vector(features: int, dtype: str, like: Array) -> Output:
    """A per-channel output beside `like`, in its library."""
    return like.library.empty((features,), (1,), dtype, like)


def destination(out: Any, argument: str = "out") -> Output:
    """A caller's own array, to be written and given back."""
    array = describe(out, argument)
    check_writable(array, argument)

    def finish() -> Any:
        array.library.mark_written(out)
        return out

    return Output(array, finish)


def check_writable(array: Array, argument: str) -> None:
    """Raise unless the array can be written: TypeError for an immutable library, ValueError for this array alone."""
    wrong = partial(refuse, array, argument)
    if array.library.immutable:
        wrong(TypeError, "be an array that can be written", f"an immutable {array.library.name} array", "Leave it out.")
    if not array.writable:
        got, remedy = "a read-only array", "Pass a copy."
        if getattr(array.owner, "requires_grad", False):
            got, remedy = "a tensor that requires a gradient", f"Pass {argument}.detach()."
        elif array.capsule is not None:
            got = "one whose capsule does not say that it may be"
            remedy = "Leave it out." if argument == "out" else f"Pass numpy.from_dlpack({argument}).copy()."
        wrong(ValueError, "be writable", got, remedy)
    if not _layout.is_distinct(array.shape, array.strides):
        got = f"elements that share memory, strides={array.strides}"
        wrong(ValueError, "have memory of its own for every element", got, "Pass a copy.")


def taken_over(buffer: Any, dtype: str, capsule_of: Callable[..., Any]) -> Any:
    """A JAX array in new memory of ours, which `capsule_of` makes capsules of."""
    return _jax(sys.modules["jax"]).adopt(Exporter(buffer, dtype, capsule_of))


_Describer = Callable[[Any, str, tuple[str, ...], bool], Array]
_DESCRIBERS: dict[type, _Describer] = {np.ndarray: NUMPY.describe, np.memmap: NUMPY.describe}


SIGNATURES: dict[type, Callable[[Any], tuple[Layout, int] | None]] = {
    np.ndarray: NUMPY.signature,
    np.memmap: NUMPY.signature,
}
"""How an array's layout is found quickly, by its type; arrays known by their capsules alone are described each time."""


def _describer(x: Any, argument: str) -> _Describer:
    """Who describes arrays of x's type, on meeting the first one; an error if nobody does."""
    kind = type(x)
    torch, jax, cupy = (sys.modules.get(name) for name in ("torch", "jax", "cupy"))
    if isinstance(x, np.ndarray):
        refuse_subclass(x, argument)
    if torch and isinstance(x, torch.Tensor):
        _check_plain(torch, x, argument)
        found = _torch(torch).describe
        if kind in (torch.Tensor, torch.nn.Parameter):  # others may answer otherwise
            SIGNATURES[kind] = _torch(torch).signature
    elif jax and isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        found = _jax(jax).describe
    elif (jax and isinstance(x, (jax.Array, jax.ShapeDtypeStruct))) or (torch and isinstance(x, torch.fx.Proxy)):
        refuse_stand_in(x, argument)
    elif cupy and isinstance(x, cupy.ndarray):
        found = _cupy(cupy).describe
        if not _cupy(cupy).is_rocm:
            SIGNATURES[kind] = _cupy(cupy).signature
    elif hasattr(kind, "__dlpack__"):
        found = _foreign(*_home(x)).describe
    else:
        refuse_non_array(x, argument)
    _DESCRIBERS[kind] = found
    return found


_SUBCLASS_REMEDIES = {
    "DTensor": "Pass {0}.to_local() or {0}.full_tensor().",
    "MaskedTensor": "Pass {0}.get_data().",
    "NestedTensor": "Pass torch.nested.to_padded_tensor({0}, 0).",
}


def _check_plain(torch: Any, x: Any, argument: str) -> None:
    """Raise unless a tensor of x's type holds numbers, and nothing more."""
    kind = type(x)
    if isinstance(x, torch.nn.parameter.UninitializedTensorMixin):
        remedy = "Run its module once, or materialize it."
        refuse(x, argument, TypeError, "be initialized", a_type(x), remedy)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        remedy = _SUBCLASS_REMEDIES.get(kind.__name__, "").format(argument)
        refuse_stand_in(x, argument, remedy=remedy)


def _home(x: Any) -> tuple[str, Callable[[Any], Any] | None]:
    """The name of x's library, and its from_dlpack."""
    name = type(x).__module__.partition(".")[0]
    try:
        namespace = x.__array_namespace__()
    except Exception:  # it has none, or none to show
        namespace = sys.modules.get(name)
    return name, getattr(namespace, "from_dlpack", None)


# one of each library
_torch, _jax, _cupy, _foreign = lru_cache(Torch), lru_cache(Jax), lru_cache(Cupy), lru_cache(Foreign)
