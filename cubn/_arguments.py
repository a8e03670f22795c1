"""The arrays an operation is given, checked against x and described for a backend. Nothing is written here."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cubn import _arrays, _layout
from cubn._arrays import BOOL, Array, Output
from cubn._types import CPU, Extents, Operand
from cubn.backends import backend_for
from cubn.backends.protocol import Backend
from cubn.errors import device_name, message, quoted

Word = TypeVar("Word", bound=str)

UNREADABLE = (TypeError, ValueError, RuntimeError)
"""What libraries raise for an array that was deleted, never filled or stands for another; a signal handler, others."""

backend = lru_cache(maxsize=None)(backend_for)


class Source(NamedTuple):
    """x, and how its axes are read."""

    array: Array
    axis: int
    extents: Extents
    operand: Operand
    backend: Backend


class Companion(NamedTuple):
    """An array that goes with x element by element."""

    array: Array
    operand: Operand


def source(function: str, x: Any, channel_axis: int, num_features: int | None = None) -> Source:
    """x, with the given number of channels if there is one."""
    array = _arrays.describe(x, function, "x")
    shape = array.shape
    if len(shape) < 2:
        remedy = "Samples and channels are two axes: a single sample has shape (1, C)."
        raise ValueError(refusal(function, "x", "have 2 axes or more", array, remedy))
    axis = _layout.channel_position(len(shape), whole(channel_axis, function, "channel_axis"), function)
    extents = _layout.extents(shape, axis)
    if not extents.C or num_features not in (None, extents.C):
        rule = f"have {num_features or '1 or more'} channels on axis {axis}"
        raise ValueError(refusal(function, "x", rule, array, "channel_axis says which axis that is."))
    return Source(array, axis, extents, _layout.operand(array, axis), backend(array.device, array.library.name))


def mask(function: str, given: Any, x: Source) -> Companion:
    """Which positions of x are present."""
    array = _arrays.describe(given, function, "mask", BOOL)
    _check_device(function, "mask", array, x)
    operand = _layout.mask_operand(array, x.array.shape, x.axis)
    if operand is None:
        shape = x.array.shape[: x.axis] + x.array.shape[x.axis + 1 :]
        rule = f"have x's shape without the channel axis, {shape}, or 1 instead of any extent"
        raise ValueError(refusal(function, "mask", rule, array))
    return Companion(array, operand)


def beside(function: str, argument: str, given: Any, x: Source) -> Companion:
    """Values that go with x's, of its shape, dtype, library and device."""
    array = _arrays.describe(given, function, argument)
    _check_like(function, argument, array, x)
    return Companion(array, _layout.operand(array, x.axis))


def parameter(function: str, argument: str, given: Any, x: Source) -> Array:
    """A per-channel array of any library on x's device."""
    array = _arrays.describe(given, function, argument, detach=True)
    if array.shape != (x.extents.C,):
        raise ValueError(refusal(function, argument, f"have shape ({x.extents.C},), one value per channel", array))
    _check_device(function, argument, array, x)
    return array


def stored(value: Any, function: str, argument: str, dtypes: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """What was written down for an array, as a new one in NumPy: an array of any library, or nested lists."""
    if isinstance(value, (list, tuple, int, float)):
        try:
            value = np.array(value)
        except UNREADABLE:  # what is in the lists
            rule = "be an array, or lists of one shape"
            raise ValueError(message(function, argument, rule, quoted(value))) from None
    return on_host(_arrays.describe(value, function, argument, dtypes, detach=True))


def plain(value: Any) -> Any:
    """A number, a word or None, which may have been stored as an array without axes."""
    try:
        return value.item() if value.shape == () else value
    except (AttributeError, *UNREADABLE):  # it has no shape, or was deleted, or is still to be initialized
        return value


def on_host(array: Array) -> np.ndarray[Any, Any]:
    """A copy in NumPy; bfloat16 comes, exactly, as float32."""
    return array.library.to_numpy(array)


class Region(NamedTuple):
    """The memory from an array's lowest address to its highest."""

    name: str
    array: Array
    low: int
    high: int


def region(name: str, array: Array) -> Region:
    return Region(name, array, *_arrays.addresses(array))


def destination(
    function: str, out: Any, x: Source, in_place: Mapping[str, Array | None], apart: Iterable[Region]
) -> Output:
    """A caller's `out`: exactly one of `in_place`, or sharing no memory with any of them; and none with `apart`, which
    is on x's device.
    """
    output = _arrays.destination(out, function)
    _check_like(function, "out", output.array, x)
    for name, array in in_place.items():
        if array is not None and _arrays.overlap(output.array, array) == "partial":
            raise ValueError(refusal(function, "out", f"be exactly {name} or share no memory with it", output.array))
    low, high = _arrays.addresses(output.array)
    for other in apart:
        if other.low < high and low < other.high and _arrays.overlap(output.array, other.array) != "none":
            raise ValueError(refusal(function, "out", f"share no memory with {other.name}", output.array))
    return output


def values_per_channel(x: Source, mask: Companion | None) -> int | None:
    """How many values of a channel are present; None where only the device knows."""
    N, _, S = x.extents
    if mask is None:
        return N * S
    if mask.array.device[0] != CPU:
        return None
    repeats = N * S // max(1, math.prod(mask.array.shape))
    return int(np.count_nonzero(on_host(mask.array))) * repeats


def flag(value: bool, function: str, argument: str) -> bool:
    """True or False, of Python or NumPy: what else is true may be meant as a no."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(message(function, argument, "be True or False", quoted(value)))


def one_of(choices: tuple[Word, ...], value: Word, function: str, argument: str) -> Word:
    """One of a few words."""
    if type(value) is str and value in choices:
        return value
    rule = f"be {' or '.join(map(repr, choices))}"
    raise (ValueError if isinstance(value, str) else TypeError)(message(function, argument, rule, quoted(value)))


def dtype_name(dtype: Any, choices: tuple[Word, ...], function: str) -> Word:
    """The name of a dtype, given as a name, or as NumPy's, JAX's or PyTorch's own."""
    name = (dtype if isinstance(dtype, str) else quoted(dtype)).rpartition(".")[2]  # of torch.float32
    if name not in choices and dtype is not None:
        with suppress(Exception):  # which may be of any kind
            found = np.dtype(dtype)
            name = found.name if found.isnative else found.str
    for choice in choices:
        if name == choice:
            return choice
    raise TypeError(message(function, "dtype", f"be {' or '.join(map(repr, choices))}", quoted(dtype)))


def whole(value: int, function: str, argument: str) -> int:
    """An integer of any library's kind; True and False are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except UNREADABLE:
        raise TypeError(message(function, argument, "be an integer", quoted(value))) from None


def shown(array: Any) -> str:
    """An array in a repr: `float32 (32, 64)`."""
    if not (hasattr(array, "dtype") and hasattr(array, "shape")):
        return "None" if array is None else type(array).__name__
    return f"{str(array.dtype).rpartition('.')[2]} {tuple(array.shape)}"


def refusal(function: str, argument: str, rule: str, array: Array, remedy: str = "") -> str:
    """The message that says what is wrong with an array, with the facts about it."""
    return message(
        function,
        argument,
        rule,
        f"a {array.library.name} array",
        remedy,
        shape=array.shape,
        dtype=array.dtype,
        device=array.device,
    )


def _check_like(function: str, argument: str, array: Array, x: Source) -> None:
    if array.shape != x.array.shape:
        raise ValueError(refusal(function, argument, f"have x's shape {x.array.shape}", array))
    _check_device(function, argument, array, x)
    if array.dtype != x.array.dtype:
        raise TypeError(refusal(function, argument, f"have x's dtype {x.array.dtype}", array, "Convert it first."))
    if array.library is not x.array.library:
        remedy = "Convert it first."
        raise TypeError(refusal(function, argument, f"be a {x.array.library.name} array, as x is", array, remedy))


def _check_device(function: str, argument: str, array: Array, x: Source) -> None:
    if array.device != x.array.device:
        rule = f"be on x's device, {device_name(x.array.device)}"
        raise ValueError(refusal(function, argument, rule, array, "Move one of them to the other's device."))
