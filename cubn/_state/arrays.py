"""The arrays of a state: described, checked against each other, and their values looked at."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from cubn import _arrays
from cubn._arguments import on_host, refusal, region
from cubn._arrays import Array, Headers
from cubn._arrays.library import Library
from cubn._layout import vector
from cubn._types import CPU, FLOATS, Affine, Running
from cubn._weak import WeakValues
from cubn.errors import StateWarning, device_name, message, reported

STATISTICS = ("running_mean", "running_var")
ARRAYS = ("gamma", "beta", *STATISTICS)

_NAMED = 8  # channels in a message


class StateLayout:
    """What all states share that hold arrays of the same libraries, dtypes, strides and rights; one object for each."""

    __slots__ = ("__weakref__",)


_LAYOUTS: WeakValues[tuple[Any, ...], StateLayout] = WeakValues()


class StateArrays:
    """A state's arrays, on one device, and the same as kernels see them."""

    __slots__ = (
        "_headers",
        "_movable",
        "_owners",
        "addresses",
        "affine",
        "arrays",
        "device",
        "layout",
        "regions",
        "running",
        "versioned",
    )

    def __init__(
        self, arrays: dict[str, Array], device: tuple[int, int] | None, owners: Mapping[str, Any] | None
    ) -> None:
        self._owners = owners
        self.arrays = arrays
        self.device = device
        gamma, beta, mean, var = (arrays.get(name) for name in ARRAYS)
        self.affine = Affine(gamma and vector(gamma), beta and vector(beta))
        self.running = Running(vector(mean), vector(var)) if mean and var else None
        self.regions = tuple(region(name, array) for name, array in arrays.items())
        at_gamma, at_beta, at_mean, at_var = (a.pointer if a else 0 for a in (gamma, beta, mean, var))
        self.addresses = at_gamma, at_beta, at_mean, at_var
        self.layout = _layout_of(arrays)
        ndarrays = [array.owner for array in arrays.values() if isinstance(array.owner, np.ndarray)]
        self._headers = Headers(ndarrays) if ndarrays else None
        movable: dict[Library, list[Array]] = {}  # a library's own: nothing but `Headers` sees what happens to others
        for array in arrays.values():
            if not array.library.fixed:
                movable.setdefault(array.library, []).append(array)
        self._movable = tuple(library.watch(group) for library, group in movable.items())
        written: dict[Library, list[Any]] = {}
        for name in STATISTICS:
            if name in arrays and arrays[name].library.counts_versions:
                written.setdefault(arrays[name].library, []).append(arrays[name].owner)
        self.versioned = tuple(written.items())

    def describes(self, owners: Mapping[str, Any]) -> bool:
        """Whether a state still holds these arrays, and they are the same memory, shape, type and as writable."""
        if owners is not self._owners or (self._headers and not self._headers.unchanged()):
            return False
        for unchanged in self._movable:  # noqa: SIM110, a generator takes longer than the rest
            if not unchanged():
                return False
        return True

    def mark_written(self) -> None:
        """Tell libraries that the running statistics were written."""
        for library, owners in self.versioned:
            library.mark_written(*owners)


def _layout_of(arrays: Mapping[str, Array]) -> StateLayout:
    facts = tuple((name, a.library, a.dtype, a.shape, a.strides, a.device, a.writable) for name, a in arrays.items())
    layout = _LAYOUTS.get(facts)
    if layout is None:
        layout = _LAYOUTS[facts] = StateLayout()
    return layout


def checked_arrays(described: dict[str, Array], owners: Mapping[str, Any] | None = None) -> StateArrays:
    """Per-channel arrays, all on one device, running statistics of one dtype; `owners` is where a state has them."""
    device = None
    for name, array in described.items():
        if device is None:
            first, device = name, array.device
        elif array.device != device:
            rule = f"be on the device of {first}, {device_name(device)}"
            raise ValueError(refusal(name, rule, array, "Move one of them to the other's device."))
    mean, var = (described.get(name) for name in STATISTICS)
    if mean and var and mean.dtype != var.dtype:
        remedy = "Convert one of them; from_arrays takes both at once."
        raise TypeError(refusal("running_var", f"have running_mean's dtype {mean.dtype}", var, remedy))
    return StateArrays(described, device, owners)


def described(array: Any, name: str) -> Array:
    """One of a state's arrays."""
    return _arrays.describe(array, name, FLOATS, detach=True)


def filled(C: int, value: float, dtype: str, like: Array | None) -> Any:
    """A new per-channel array in the library of `like`, or NumPy's."""
    return placed(np.full(C, value, dtype), like)


def placed(values: np.ndarray[Any, Any], like: Array | None) -> Any:
    """The values in the library of `like`, on its device; themselves without it."""
    return values if like is None else like.library.from_numpy(values, values.dtype.name, like)


def check_together(described: Mapping[str, Array]) -> None:
    """Running statistics come both or neither, and share no memory with another array."""
    held = [name for name in STATISTICS if name in described]
    if len(held) == 1:
        (other,) = set(STATISTICS) - set(held)
        remedy = "Give both for running statistics, or neither."
        raise ValueError(message(other, f"be given together with {held[0]}", None, remedy))
    for name in held:
        for other, array in described.items():
            if other != name and _arrays.overlap(described[name], array) != "none":
                remedy = "Pass a copy of one of them."
                raise ValueError(refusal(name, f"share no memory with {other}", described[name], remedy))


def check_on_host(described: Mapping[str, Array]) -> None:
    """Check the values of those running statistics that are on the host. A device is not waited for."""
    host = {name: described[name] for name in STATISTICS if name in described and described[name].device[0] == CPU}
    advice = "check=False takes it all the same, to be examined or repaired."
    check_values({name: (array, on_host(array)) for name, array in host.items()}, advice)


def check_values(found: Mapping[str, tuple[Array, np.ndarray[Any, Any]]], advice: str = "") -> None:
    """Raise where a variance is negative, and warn where running statistics are not finite."""
    if "running_var" in found:
        array, var = found["running_var"]
        if below := _where(var < 0):
            rule = f"be 0 or more, but is negative in {channels(below)}"
            raise ValueError(refusal("running_var", rule, array, f"{advice} reset() starts over.".lstrip()))
    for name, (_, values) in found.items():
        if wild := _where(~np.isfinite(values)):
            text = f"{reported()}: {name} is not finite in {channels(wild)}, and neither is what is computed from it."
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
