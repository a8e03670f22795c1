"""Compiling the kernels of layers before they are first used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cubn import _arrays
from cubn._ahead import Calls, layer, prepare
from cubn._arguments import as_int, flag
from cubn._types import CPU, CUDA, FLOATS
from cubn.backends import backend_for
from cubn.errors import message, quoted, reporting_as


@reporting_as("warm_up")
def warm_up(
    shapes: Sequence[int] | Iterable[Sequence[int]],
    *,
    dtype: Any = None,
    channel_axis: int = 1,
    channels_last: bool = False,
    residual: bool = False,
    relu: bool = False,
    training: bool = True,
    inference: bool = True,
    device: str | None = None,
    like: Any = None,
) -> None:
    """Compile the kernels that layers will need, so that their first calls need not.

    Nothing is computed, and no memory of the arrays' size is used. What is compiled goes to the kernel cache, where
    later processes find it; what is there already is only loaded.

    Parameters
    ----------
    shapes : tuple of int, or iterable of them
        Of the arrays x; batch size and all.
    dtype : str or dtype of NumPy, PyTorch or JAX, optional
        Of x: float16, bfloat16, float32 or float64. By default that of `like`, else float32.
    channel_axis : int
        Which axis of the shapes is the channels'.
    channels_last : bool
        Whether neighbouring channels are neighbours in memory wherever their axis is, as in PyTorch's memory format
        `channels_last`.
    residual, relu : bool
        What is fused into the layers: calls with `residual=`, and with `relu=True`.
    training : bool
        For `forward_train` and `backward`.
    inference : bool
        For `forward`.
    device : str, optional
        "cpu", "cuda" or "cuda:1". By default that of `like`, else "cpu".
    like : array of any library, optional
        An array as the layers will be given: its dtype, library and device.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    numpy.exceptions.AxisError
        If a shape has no such channel_axis.
    BackendUnavailable, ImportError
        If nothing computes on the device, or kernels cannot be compiled for it.

    Notes
    -----
    On CUDA devices kernels are made for dtype, layout and a few classes of sizes, and are compiled on all cores at
    once; on the CPU for a number of threads too. Masks, `comm=`, `moments` and `forward_frozen` have other kernels
    besides.

    Examples
    --------
    >>> import cubn
    >>> cubn.warm_up([(32, 64, 56, 56), (32, 256, 56, 56)], relu=True)
    """
    asked = {"residual": residual, "relu": relu, "training": training, "inference": inference}
    array = None if like is None else _arrays.describe(like, "like", detach=True)
    place = _device(device) if device is not None else array.device if array else (CPU, 0)
    name = _dtype(dtype) if dtype is not None else array.dtype if array else "float32"
    calls = Calls(*(flag(value, argument) for argument, value in asked.items()))
    axis, last = as_int(channel_axis, "channel_axis"), flag(channels_last, "channels_last")
    layers = [layer(shape, axis, last, name) for shape in _shapes(shapes)]
    backend = backend_for(place, array.library.name if array and array.device == place else "")
    if backend.device is None:
        from cubn.backends.cpu import pool

        pool.compile_workers()
        prepare(backend, layers, calls)  # which compiles
    else:
        from cubn.backends.cuda.planned import launches_of

        backend.device.compile(launches_of(backend.device.limits, lambda planned: prepare(planned, layers, calls)))


# --- arguments --------------------------------------------------------------------------------------------------------


def _shapes(shapes: Any) -> list[tuple[int, ...]]:
    try:
        found = list(shapes)
        is_one = found and all(hasattr(extent, "__index__") for extent in found)
        found = [found] if is_one else [list(shape) for shape in found]
    except TypeError:
        raise TypeError(message("shapes", "be a shape, or several", quoted(shapes))) from None
    checked = [tuple(as_int(extent, "shapes") for extent in shape) for shape in found]
    for shape in checked:
        if len(shape) < 2 or min(shape) < 1:
            rule = "have two axes or more, each with an extent of 1 or more"
            raise ValueError(message("shapes", rule, quoted(shape)))
    return checked


def _dtype(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = ""
    if name not in FLOATS:
        raise ValueError(message("dtype", f"be one of {', '.join(FLOATS)}", quoted(dtype)))
    return name


def _device(device: Any) -> tuple[int, int]:
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", str(device))
    if not found or (found[1] == "cpu" and found[2]):
        raise ValueError(message("device", 'be "cpu", "cuda" or the like of "cuda:1"', quoted(device)))
    return (CUDA, int(found[2] or 0)) if found[1] == "cuda" else (CPU, 0)
