"""Arguments checked by themselves and against x. Nothing is written here."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cubn import _arrays
from cubn._arrays import Array, Output
from cubn._arrays.memory import view
from cubn._types import CPU, Extents
from cubn.errors import device_name, message, quoted

Word = TypeVar("Word", bound=str)

UNREADABLE = (TypeError, ValueError, RuntimeError)
"""What libraries raise for an array that was deleted, never filled or stands for another; a signal handler, others."""


def stored(value: Any, argument: str, dtypes: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """What was written down for an array, as a new one in NumPy: an array of any library, or nested lists."""
    if isinstance(value, (list, tuple, int, float)):
        try:
            value = np.array(value)
        except UNREADABLE:  # what is in the lists
            rule = "be an array, or lists of one shape"
            raise ValueError(message(argument, rule, quoted(value))) from None
    return on_host(_arrays.describe(value, argument, dtypes, detach=True))


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


def destination(out: Any, x: Array, in_place: Mapping[str, Array | None], apart: Iterable[Region]) -> Output:
    """A caller's `out`: exactly one of `in_place`, or sharing no memory with any of them; and none with `apart`, which
    is on x's device.
    """
    output = _arrays.destination(out)
    check_like("out", output.array, x)
    for name, array in in_place.items():
        if array is not None and _arrays.overlap(output.array, array) == "partial":
            raise ValueError(refusal("out", f"be exactly {name} or share no memory with it", output.array))
    low, high = _arrays.addresses(output.array)
    for other in apart:
        if other.low < high and low < other.high and _arrays.overlap(output.array, other.array) != "none":
            raise ValueError(refusal("out", f"share no memory with {other.name}", output.array))
    return output


def values_per_channel(extents: Extents, mask: Array | None) -> int | None:
    """How many values of a channel are present; None where only the device knows."""
    N, _, S = extents
    if mask is None or not N * S:
        return N * S
    if mask.device[0] != CPU:
        return None
    repeats = N * S // max(1, math.prod(mask.shape))
    return int(np.count_nonzero(view(mask))) * repeats


def flag(value: bool, argument: str) -> bool:
    """True or False, of Python or NumPy: what else is true may be meant as a no."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(message(argument, "be True or False", quoted(value)))


def one_of(choices: tuple[Word, ...], value: Word, argument: str) -> Word:
    """One of a few words."""
    if type(value) is str and value in choices:
        return value
    rule = f"be {' or '.join(map(repr, choices))}"
    raise (ValueError if isinstance(value, str) else TypeError)(message(argument, rule, quoted(value)))


def dtype_name(dtype: Any, choices: tuple[Word, ...]) -> Word:
    """The name of a dtype, given as a name, or as NumPy's, JAX's or PyTorch's own."""
    name = (dtype if isinstance(dtype, str) else quoted(dtype)).rpartition(".")[2]  # of torch.float32
    if name not in choices and dtype is not None:
        with suppress(Exception):  # which may be of any kind
            found = np.dtype(dtype)
            name = found.name if found.isnative else found.str
    for choice in choices:
        if name == choice:
            return choice
    raise TypeError(message("dtype", f"be {' or '.join(map(repr, choices))}", quoted(dtype)))


def as_int(value: int, argument: str) -> int:
    """An integer of any library's kind; True and False are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except UNREADABLE:
        raise TypeError(message(argument, "be an integer", quoted(value))) from None


def shown(array: Any) -> str:
    """An array in a repr: `float32 (32, 64)`."""
    if not (hasattr(array, "dtype") and hasattr(array, "shape")):
        return "None" if array is None else type(array).__name__
    return f"{str(array.dtype).rpartition('.')[2]} {tuple(array.shape)}"


def refusal(argument: str, rule: str, array: Array, remedy: str = "") -> str:
    """The message that says what is wrong with an array, with the facts about it."""
    return message(
        argument,
        rule,
        f"a {array.library.name} array",
        remedy,
        shape=array.shape,
        dtype=array.dtype,
        device=array.device,
    )


def check_like(argument: str, array: Array, x: Array) -> None:
    """Raise unless an array has x's shape, dtype, library and device."""
    if array.shape != x.shape:
        raise ValueError(refusal(argument, f"have x's shape {x.shape}", array))
    check_device(argument, array, x)
    if array.dtype != x.dtype:
        raise TypeError(refusal(argument, f"have x's dtype {x.dtype}", array, "Convert it first."))
    if array.library is not x.library:
        remedy = "Convert it first."
        raise TypeError(refusal(argument, f"be a {x.library.name} array, as x is", array, remedy))


def check_device(argument: str, array: Array, x: Array) -> None:
    """Raise unless an array is where x is."""
    if array.device != x.device:
        rule = f"be on x's device, {device_name(x.device)}"
        raise ValueError(refusal(argument, rule, array, "Move one of them to the other's device."))
