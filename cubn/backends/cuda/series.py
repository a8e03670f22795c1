"""Launches one after the other, whose parameters are complete but for the values of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from cubn.backends.cuda.device import Device, Stream
from cubn.backends.cuda.parameters import Template, Values, members
from cubn.backends.cuda.plan import Fields, Launch

APART = 256
"""Parts of a call's memory begin at multiples of so many bytes, more than any access takes at once."""


class Series:
    """Launches that take addresses and numbers from the values of a call.

    Values have names: those of the members of `Parameters` that they go into, unless something else is said. The last
    values are the addresses of the parts of memory that every call brings along.
    """

    def __init__(self, values: Iterable[str]) -> None:
        self._places = {name: place for place, name in enumerate(values)}
        self._offsets: tuple[int, ...] = ()  # of the parts, in bytes
        self._launches: list[tuple[Launch, Callable[[Values], bytearray]]] = []
        self._is_compiled = False
        self.numbers = 0
        """Float64 numbers of the memory."""
        self.begins_at_zero = False
        """Whether calls must bring zeros."""

    def reserve(self, name: str, numbers: int) -> int:
        """Memory for so many float64 numbers; which of all is their first."""
        begin = self.numbers
        self._places[name] = len(self._places)
        self._offsets += (8 * begin,)
        self.numbers += -(-8 * numbers // APART) * APART // 8
        return begin

    def add(
        self,
        launch: Launch,
        names: Iterable[str],
        fields: Fields | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        """`names`: of the members that take the value of their own name, where calls have it; `sources`: of those that
        take another one.
        """
        known = members()
        wanted = {**{name: name for name in names}, **(sources or {})}
        places = {
            member if member in known else f"{member}.pointer": self._places[name]
            for member, name in wanted.items()
            if name in self._places
        }
        self._launches.append((launch, Template({**dict(launch.fields), **(fields or {})}, places).filled))

    def parts(self, memory: int) -> tuple[int, ...]:
        """Their addresses, in memory of a call's own."""
        return tuple([memory + offset for offset in self._offsets])

    def compile(self, device: Device) -> None:
        """All kernels at once: when they are launched, each would be compiled after the other."""
        device.compile([launch for launch, _ in self._launches])
        self._is_compiled = True

    def run(self, device: Device, values: Values, stream: Stream) -> None:
        """On the device's current stream, which the caller has asked for."""
        if not self._is_compiled:
            self.compile(device)
        for launch, filled in self._launches:
            device.launch(launch, filled(values), stream)

    def run_behind(
        self, device: Device, values: Values, stream: Stream, before: Stream | None, *memory: object
    ) -> None:
        """Run behind what `before` has done to memory, which is kept until this is done."""
        if before is None or before is stream:
            self.run(device, values, stream)
            return
        device.wait_for(before)
        self.run(device, values, stream)
        device.hold(*memory)
