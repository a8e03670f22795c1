"""Errors about one array, with what is known of it."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import numpy as np

from cubn._arrays.library import Array
from cubn._types import CPU, CUDA
from cubn.errors import a_type, message

_DEVICE_TYPES = {"cpu": CPU, "cuda": CUDA}
_LIBRARY = re.compile(r"^\w+\.(?=\w+$)")  # in torch.float32


def refuse(x: Any, argument: str, error: type[Exception], rule: str, got: object, remedy: str) -> NoReturn:
    """Raise what is wrong with x, with the facts known about it."""
    raise error(message(argument, rule, got, remedy, **facts(x)))


def refuse_non_array(x: Any, argument: str) -> NoReturn:
    remedy = ""
    if conversion := _to_array(x):
        remedy = f"Pass {conversion.format(argument)}."
    refuse(x, argument, TypeError, "be an array with __dlpack__", a_type(x), remedy)


def refuse_subclass(x: Any, argument: str) -> NoReturn:
    """Subclasses of NumPy's array mean more, or other, than their numbers: masks, units, matrix products."""
    remedy = f"Pass numpy.asarray({argument})."
    if isinstance(x, np.ma.MaskedArray):
        remedy = f"Pass {argument}.filled(0), or with what should stand where it is masked."
        if argument == "x":  # the only one that has a mask beside it
            mask = "mask=~numpy.ma.getmaskarray(x).any(channel_axis)"
            remedy = f"Pass x.filled(0), with {mask}: a position is present in all channels or in none."
    refuse(x, argument, TypeError, "be a plain numpy.ndarray", a_type(x), remedy)


def refuse_dtype(x: Any, dtype: str, dtypes: tuple[str, ...], argument: str, conversion: str = "") -> NoReturn:
    """`conversion` is how x's library converts `{0}` to dtype `{1}`, or what else to say."""
    *most, last = dtypes
    rule = f"have dtype {', '.join(most)} or {last}" if most else f"have dtype {last}"
    if dtype.startswith("complex"):
        conversion = "Pass {0}.real and {0}.imag apart."
    remedy = conversion.format(argument, "float32" if "float32" in dtypes else last)
    refuse(x, argument, TypeError, rule, dtype, remedy or "Convert it first.")


def refuse_stand_in(x: Any, argument: str, where: str = "", remedy: str = "") -> NoReturn:
    rule = "hold numbers in memory, not stand for them"
    remedy = remedy or "Call it outside tracing, vmap and the like."
    refuse(x, argument, TypeError, rule, f"{a_type(x)}{where}", remedy)


def refuse_misaligned(x: Any, argument: str, got: str) -> NoReturn:
    refuse(x, argument, ValueError, "be aligned to its elements", got, "Pass a copy.")


def refuse_device(x: Any, device: str, argument: str, remedy: str = "Move it there first.") -> NoReturn:
    refuse(x, argument, NotImplementedError, "be on a CPU or CUDA device", device, remedy)


def facts(x: Any) -> dict[str, Any]:
    """Shape, dtype and device, as far as x has them and they mean that."""
    if isinstance(x, type):
        return {}
    shape, dtype, device = (_attribute(x, name) for name in ("shape", "dtype", "device"))
    if not isinstance(x, Array):
        kind, _, index = str(device).partition(":")
        device = (_DEVICE_TYPES[kind], int(index or 0)) if kind in _DEVICE_TYPES else None
    return {
        "shape": tuple(shape) if isinstance(shape, tuple) else None,
        "dtype": None if dtype is None else _LIBRARY.sub("", str(dtype)),
        "device": device,
    }


def _attribute(x: Any, name: str) -> Any:
    """The attribute, or None: a deleted or nested array raises anything when asked."""
    try:
        return getattr(x, name, None)
    except Exception:
        return None


def _to_array(x: Any) -> str:
    """How `{0}`, which is no array, becomes one, if it does."""
    if isinstance(x, (str, bytes, np.generic, type)):
        return ""
    conversions = {
        "toarray": "{0}.toarray()",  # sparse matrices
        "todense": "{0}.todense()",
        "__cuda_array_interface__": "cupy.asarray({0})",
        "__array__": "numpy.asarray({0})",
        "__array_interface__": "numpy.asarray({0})",
    }
    for name, conversion in conversions.items():
        if _attribute(x, name) is not None:
            return conversion
    return "numpy.asarray({0})" if type(x) in (list, tuple) or _is_buffer(x) else ""


def _is_buffer(x: Any) -> bool:
    try:
        memoryview(x)
    except TypeError:
        return False
    return True
