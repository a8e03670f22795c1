"""A device for calls whose arrays belong to several libraries."""

from __future__ import annotations

from typing import Any, cast

from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.device import Device, Stream
from cubn.backends.cuda.plan import Launch


class SharedDevice:
    """The first device, where every kernel comes behind the work of all the libraries, and theirs behind it."""

    def __init__(self, device: Device, others: tuple[Device, ...]) -> None:
        self._device = device
        self._others = others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def launch(self, launch: Launch, parameters: bytearray, stream: Stream) -> None:
        others = () if self._device.capturing() else self._others  # which a graph would take in
        for other in others:
            self._device.wait_for(other.stream())
        self._device.launch(launch, parameters, stream)
        for other in others:
            other.wait_for(stream)


def among(first: CudaBackend, *others: CudaBackend) -> CudaBackend:
    """A backend for arrays of the libraries of these, that works where the first does."""
    devices = tuple(other.device for other in others)
    return CudaBackend(cast(Device, SharedDevice(first.device, devices)))
