"""The arrays of a state: described, checked against each other, and their values looked at."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cubn import _arrays
from cubn._arguments import Region, on_host, refusal, region
from cubn._arrays import FLOATS, Array, Headers
from cubn._layout import vector
from cubn._state.options import STATE
from cubn._types import Affine, CPU, Vector
from cubn.errors import StateWarning, device_name, message

STATISTICS = ("running_mean", "running_var")
ARRAYS = ("gamma", "beta", *STATISTICS)

_NAMED = 8  # channels in a message


class Held(NamedTuple):
    """A state's arrays, on one device, and the same as kernels see them."""

    arrays: dict[str, Array]
    regions: tuple[Region, ...]
    device: tuple[int, int] | None
    fixed: bool  # nothing moves or converts the arrays, but for what `headers` see
    headers: Headers
    affine: Affine
    running: tuple[Vector, Vector] | None  # mean and variance

    def is_of(self, owners: Mapping[str, Any]) -> bool:
        """Whether these arrays were held, and are still as they were."""
        for name, owner in owners.items():
            array = self.arrays.get(name)
            if array is None:
                if owner is not None:
                    return False
            elif array.owner is not owner or not array.library.unchanged(array):
                return False
        return True


def hold(described: dict[str, Array], function: str) -> Held:
    """Per-channel arrays, all on one device, the running statistics of one dtype."""
    device = None
    for name, array in described.items():
        if device is None:
            first, device = name, array.device
        elif array.device != device:
            rule = f"be on the device of {first}, {device_name(device)}"
            raise ValueError(refusal(function, name, rule, array, "Move one of them to the other's device."))
    mean, var = (described.get(name) for name in STATISTICS)
    if mean and var and mean.dtype != var.dtype:
        remedy = "Convert one of them; from_arrays takes both at once."
        raise TypeError(refusal(function, "running_var", f"have running_mean's dtype {mean.dtype}", var, remedy))
    gamma, beta = (vector(described[name]) if name in described else None for name in ("gamma", "beta"))
    running = (vector(mean), vector(var)) if mean and var else None
    fixed = all(array.library.fixed for array in described.values())
    headers = Headers(array.owner for array in described.values() if isinstance(array.owner, np.ndarray))
    regions = tuple(region(name, array) for name, array in described.items())
    return Held(described, regions, device, fixed, headers, Affine(gamma, beta), running)


def described(array: Any, name: str, function: str = STATE) -> Array:
    """One of a state's arrays."""
    return _arrays.describe(array, function, name, FLOATS, detach=True)


def filled(C: int, value: float, dtype: str, beside: Array | None) -> Any:
    """A new per-channel array in the library of `beside`, or NumPy's."""
    return placed(np.full(C, value, dtype), beside)


def placed(values: np.ndarray[Any, Any], beside: Array | None) -> Any:
    """The values in the library of `beside`, on its device; themselves without it."""
    return values if beside is None else beside.library.from_numpy(values, values.dtype.name, beside)


def check_together(described: Mapping[str, Array]) -> None:
    """Running statistics come both or neither, and share no memory with another array."""
    held = [name for name in STATISTICS if name in described]
    if len(held) == 1:
        (other,) = set(STATISTICS) - set(held)
        remedy = "Give both for running statistics, or neither."
        raise ValueError(message(STATE, other, f"be given together with {held[0]}", None, remedy))
    for name in held:
        for other, array in described.items():
            if other != name and _arrays.overlap(described[name], array) != "none":
                remedy = "Pass a copy of one of them."
                raise ValueError(refusal(STATE, name, f"share no memory with {other}", described[name], remedy))


def check_on_host(described: Mapping[str, Array]) -> None:
    """Check the values of those running statistics that are on the host. A device is not waited for."""
    host = {name: described[name] for name in STATISTICS if name in described and described[name].device[0] == CPU}
    advice = "check=False takes it all the same, to be examined or repaired."
    check_values({name: (array, on_host(array)) for name, array in host.items()}, STATE, advice)


def check_values(found: Mapping[str, tuple[Array, np.ndarray[Any, Any]]], function: str, advice: str = "") -> None:
    """Raise where a variance is negative, and warn where running statistics are not finite."""
    if "running_var" in found:
        array, var = found["running_var"]
        if below := _where(var < 0):
            rule = f"be 0 or more, but is negative in {channels(below)}"
            raise ValueError(refusal(function, "running_var", rule, array, f"{advice} reset() starts over.".lstrip()))
    for name, (_, values) in found.items():
        if wild := _where(~np.isfinite(values)):
            text = f"{function}: {name} is not finite in {channels(wild)}, and neither is what is computed from it."
            repair = "The next training batch replaces it, and reset() starts over."
            warnings.warn(f"{text} {repair} {advice}".rstrip(), StateWarning, stacklevel=_outside())


def _where(wrong: np.ndarray[Any, Any]) -> list[int]:
    found: list[int] = np.flatnonzero(wrong).tolist()
    return found


def channels(numbers: list[int]) -> str:
    """`channel 3`, `channels 1, 2, 5`."""
    first = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"channel{'s' if len(numbers) > 1 else ''} {first}{more}"


def summary(owners: Mapping[str, Any]) -> list[str]:
    """Of a state's arrays: `gamma, beta: torch float32 on cpu`, then what is wrong with values on the host."""
    alike: dict[str, list[str]] = {}
    wrong = []
    for name, owner in owners.items():
        if owner is None:
            continue
        try:
            array = described(owner, name)
        except Exception as error:  # what a framework made of it since
            alike.setdefault(f"unusable, {type(error).__name__}", []).append(name)
            continue
        kind = f"{array.library.name} {array.dtype} on {device_name(array.device)}"
        alike.setdefault(kind, []).append(name)
        if array.device[0] == CPU:
            values = on_host(array)
            if wild := _where(~np.isfinite(values)):
                wrong.append(f"{name} not finite in {channels(wild)}")
            if name == "running_var" and (below := _where(values < 0)):
                wrong.append(f"{name} negative in {channels(below)}")
    return [*(f"{', '.join(names)}: {kind}" for kind, names in alike.items()), *wrong]


def _outside() -> int:
    """The stack level, for a warning of the caller, of the code that called cubn."""
    level = 2
    while (sys._getframe(level).f_globals.get("__name__") or "").partition(".")[0] in ("cubn", "contextlib"):
        level += 1
    return level
