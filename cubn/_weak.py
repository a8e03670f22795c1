"""Collections of what others hold. Unlike those of `weakref`, they run no bytecode when an object goes: Python drops an
exception that a signal handler raises there, so that Ctrl-C would be lost.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
T = TypeVar("T")


class WeakObjects(Generic[V]):
    """Objects that are there, each known by its identity."""

    def __init__(self) -> None:
        self._references: set[weakref.ref[V]] = set()

    def add(self, found: V) -> None:
        self._references.add(weakref.ref(found, self._references.discard))

    def __len__(self) -> int:
        return len(self._references)

    def alive(self) -> list[V]:
        return [found for reference in list(self._references) if (found := reference()) is not None]


class WeakValues(Generic[K, V]):
    """Values by key, as long as they are there."""

    def __init__(self) -> None:
        self._references: dict[K, weakref.ref[V]] = {}

    def get(self, key: K) -> V | None:
        reference = self._references.get(key)
        return None if reference is None else reference()

    def __setitem__(self, key: K, value: V) -> None:
        # called as pop(key, reference), whose second argument is what pop returns for want of the key
        self._references[key] = weakref.ref(value, functools.partial(self._references.pop, key))


class Leases(Generic[T]):
    """Things that are kept as long as somebody has them, and on until `ended` gives them out."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Any], T]] = {}  # by the reference's identity
        self._gone: deque[weakref.ref[Any]] = deque()

    def lend(self, thing: T, holder: Any) -> None:
        reference = weakref.ref(holder, self._gone.append)
        self._kept[id(reference)] = reference, thing

    def ended(self) -> tuple[T, ...]:
        """Those whose holders have gone since the last time."""
        found = []
        while self._gone:
            try:
                reference = self._gone.popleft()
            except IndexError:  # another thread had the last one
                break
            found.append(self._kept.pop(id(reference))[1])
        return tuple(found)
