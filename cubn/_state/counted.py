"""A state's counters: in the host's memory or a device's, where they know the stream that wrote them last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cubn._arrays.numpy import address_of
from cubn._types import Counters
from cubn.backends.protocol import Backend

if TYPE_CHECKING:
    from cubn.backends.cuda.device import Device

Int64 = NDArray[np.int64]

COUNTERS = ("tracked", "skipped")


class Counted:
    """Counters per channel, int64, in the host's memory; nobody else's.

    `with counted as at:` gives their addresses to kernels.
    """

    __slots__ = ("_memory", "at")

    place: Backend | None = None
    device: Device | None = None
    at: Counters | None
    """Their addresses, where kernels may have them without a `with`."""

    def __init__(self, memory: Any, at: Counters) -> None:
        self._memory = memory
        self.at = at

    def on_host(self) -> dict[str, Int64]:
        """Copies in NumPy."""
        return {name: array.copy() for name, array in zip(COUNTERS, self._memory, strict=True)}

    def copied(self) -> Counted:
        return counted(None, self.on_host())

    def __enter__(self) -> Counters:
        assert self.at
        return self.at

    def __exit__(self, *error: object) -> None:
        """Nothing is under way."""


class CountedOnDevice(Counted):
    """Counters in a device's memory, which goes back to the stream that it was made on.

    Another stream that has to do with them waits for the last one that had, and keeps them until it is done.
    """

    __slots__ = ("_addresses", "_birth", "_last", "device", "place")

    place: Backend
    device: Device

    def __init__(self, place: Backend, device: Device, memory: Any, at: Counters) -> None:
        self.place, self.device = place, device
        self._memory = memory
        self._addresses = at
        self._birth = self._last = device.stream()

    @property
    def at(self) -> Counters | None:  # type: ignore[override]
        return self._addresses if self.device.stream() is self._last is self._birth else None

    def on_host(self) -> dict[str, Int64]:
        self._follow()
        return {name: row.copy() for name, row in zip(COUNTERS, self.place.to_host(self._memory), strict=True)}

    def copied(self) -> Counted:
        with self:
            return _of_table(self.place, self.device, self.device.beside((self._memory,)))

    def __enter__(self) -> Counters:
        self._follow()
        self._last = self.device.stream()
        return self._addresses

    def __exit__(self, *error: object) -> None:
        if self._last is not self._birth:
            self.device.hold(self._memory)

    def _follow(self) -> None:
        if self.device.stream() is not self._last:
            self.device.wait_for(self._last)


def counted(place: Backend | None, values: Mapping[str, Int64]) -> Counted:
    """Counters of these values where a backend can write them; those on the host are the arrays given."""
    arrays = tuple(values[name] for name in COUNTERS)
    if place is None or place.device is None:
        return Counted(arrays, Counters(*map(address_of, arrays)))
    return _of_table(place, place.device, place.from_host(np.stack(arrays)))


def counted_in(place: Backend, memory: Any, at: Counters) -> Counted:
    """Counters in memory of somebody else's, who alone reads them; written on the current stream."""
    return Counted(memory, at) if place.device is None else CountedOnDevice(place, place.device, memory, at)


def _of_table(place: Backend, device: Device, table: Any) -> CountedOnDevice:
    """Counters one below the other."""
    tracked = place.address(table)
    return CountedOnDevice(place, device, table, Counters(tracked, tracked + 8 * table.shape[1]))
