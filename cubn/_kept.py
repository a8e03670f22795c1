"""Results of pure functions, kept for the next call: bounded by bytes, so that no series of shapes fills the memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar


class Weighed(Protocol):
    """What knows how many bytes it holds, as arrays do."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Weighed)

ENTRY = 4096
"""Bytes that are counted for a key and for what every result has."""


class Store(Generic[T]):
    """A memory of `most` bytes; what was not asked for lately makes way.

    What alone is more than `most` is not kept. There is no lock, which a signal handler or a forked child might find
    taken: each step on the dict is whole by itself. How much it holds is added up along the way, and counted anew
    where room is made, a quarter of it at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0  # bytes, or about that: what two threads add at once may count as one
        self.entries: dict[tuple[Any, ...], Entry[T]] = {}

    def get(self, key: tuple[Any, ...]) -> T | None:
        """What was added under a key, if it is still there: one look-up."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        entry.asked_for = True  # so it is spared when room is made
        return entry.value

    def add(self, key: tuple[Any, ...], value: T) -> None:
        """Keep a value."""
        entry = Entry(value)
        if entry.nbytes <= self._most:
            self._held += entry.nbytes
            if self._held > self._most:
                self._make_room(entry.nbytes)
            self.entries[key] = entry

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.copy().values())

    def cache_clear(self) -> None:
        self.entries.clear()
        self._held = 0

    def _make_room(self, size: int) -> None:
        """The oldest go, but for those asked for since they came or were last spared."""
        most = self._most
        while (excess := self.nbytes + size - most) > 0:
            most = max(size, 3 * self._most // 4)
            excess = max(excess, self.nbytes + size - most)
            for key, entry in self.entries.copy().items():
                if excess <= 0:
                    break
                self.entries.pop(key, None)
                if entry.asked_for:
                    entry.asked_for = False
                    self.entries[key] = entry
                else:
                    excess -= entry.nbytes
        self._held = self.nbytes + size


class Kept(Store[T]):
    """A function whose results are kept."""

    def __init__(self, function: Callable[..., T], most: int) -> None:
        super().__init__(most)
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *key: Any) -> T:
        found = self.get(key)
        if found is None:
            found = self._function(*key)
            self.add(key, found)
        return found


class Entry(Generic[T]):
    __slots__ = ("asked_for", "nbytes", "value")

    def __init__(self, value: T) -> None:
        self.value = value
        self.nbytes = ENTRY + value.nbytes
        self.asked_for = False


def kept(most: int) -> Callable[[Callable[..., T]], Kept[T]]:
    """Keep up to `most` bytes of a function's results."""
    return lambda function: Kept(function, most)
