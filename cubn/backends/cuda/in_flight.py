"""What work on a device still uses, while nothing else may keep it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol


class Event(Protocol):
    """A place in a stream; CuPy's."""

    def record(self, stream: Any) -> None:
        """Put it behind what the stream has so far, wherever it was before."""

    @property
    def done(self) -> bool:
        """Whether the device got there; asked without waiting."""


class InFlight:
    """Things, each kept until the work so far on a stream is done. Several threads may keep some at once.

    Later calls look what is done, without waiting. There is no lock: every step is one operation of a dictionary or a
    list, so that neither a thread nor an interrupt comes in between, and what goes may itself call for more.
    """

    def __init__(self, new_event: Callable[[], Event]) -> None:
        self._new_event = new_event
        self._events: list[Event] = []  # to be used again
        self._kept: dict[int, tuple[Event | None, tuple[object, ...]]] = {}
        self._keys = itertools.count()

    def __len__(self) -> int:
        return len(self._kept)

    def hold(self, stream: Any, things: tuple[object, ...]) -> None:
        """Until the work so far on a stream is done. The device must be the current one."""
        self._sweep()
        key = next(self._keys)
        self._kept[key] = None, things  # an interrupt from here on leaves them here
        event = self._event()
        event.record(stream)
        self._kept[key] = event, things

    def hold_for_good(self, things: tuple[object, ...]) -> None:
        """What a graph uses, whenever it is replayed."""
        self._kept[next(self._keys)] = None, things

    def order(self, before: Any, after: Any) -> None:
        """Let the work on a stream from now on come behind that of another so far."""
        event = self._event()
        event.record(before)
        after.wait_event(event)  # which is for the event as it is now
        self._events.append(event)

    def _event(self) -> Event:
        try:
            return self._events.pop()
        except IndexError:
            return self._new_event()

    def _sweep(self) -> None:
        for key in list(self._kept):  # not of items: making their tuples may run other code, which keeps more
            event, _ = self._kept.get(key, (None, ()))
            if event is not None and event.done and self._kept.pop(key, None) is not None:
                self._events.append(event)
