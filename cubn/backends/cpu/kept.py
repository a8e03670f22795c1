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


class Kept(Generic[T]):
    """A function with a memory of `most` bytes; what was not asked for lately makes way.

    A call that finds its result costs one look-up. A result that alone is more than `most` is not kept. There is no
    lock, which a signal handler or a forked child might find taken: each step on the dict is whole by itself, and what
    it holds is counted anew where something is added.
    """

    def __init__(self, function: Callable[..., T], most: int) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._most = most
        self._entries: dict[tuple[Any, ...], _Entry[T]] = {}

    def __call__(self, *key: Any) -> T:
        try:
            entry = self._entries[key]
        except KeyError:
            return self._added(key)
        entry.asked_for = True
        return entry.value

    def _added(self, key: tuple[Any, ...]) -> T:
        entry = _Entry(self._function(*key))
        if entry.nbytes <= self._most:
            self._make_room(entry.nbytes)
            self._entries[key] = entry
        return entry.value

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.copy().values())

    def cache_clear(self) -> None:
        self._entries.clear()

    def _make_room(self, size: int) -> None:
        """The oldest go, but for those asked for since they came or were last spared."""
        while (excess := self.nbytes + size - self._most) > 0:
            for key, entry in self._entries.copy().items():
                if excess <= 0:
                    break
                self._entries.pop(key, None)
                if entry.asked_for:
                    entry.asked_for = False
                    self._entries[key] = entry
                else:
                    excess -= entry.nbytes


class _Entry(Generic[T]):
    __slots__ = ("asked_for", "nbytes", "value")

    def __init__(self, value: T) -> None:
        self.value = value
        self.nbytes = ENTRY + value.nbytes
        self.asked_for = False


def kept(most: int) -> Callable[[Callable[..., T]], Kept[T]]:
    """Keep up to `most` bytes of a function's results."""
    return lambda function: Kept(function, most)
