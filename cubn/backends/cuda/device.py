"""What the backend asks of a CUDA device: memory, launches, limits. One small class, so that there can be another."""

from __future__ import annotations

from typing import Any, Protocol

from cubn.backends import BackendArray
from cubn.backends.cuda.plan import Launch, Limits


class Device(Protocol):
    """A device and the stream that work on it goes to."""

    limits: Limits

    def empty(self, shape: tuple[int, ...], dtype: str) -> BackendArray:
        """Memory of its own, dense; it is used in stream order."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> BackendArray:
        """The same, of zeros."""

    def from_host(self, values: Any) -> BackendArray:
        """A copy of a NumPy array."""

    def to_host(self, array: BackendArray) -> Any:
        """A copy in NumPy; waits for the work before it."""

    def address(self, array: BackendArray) -> int:
        """Where an array's first element is."""

    def launch(self, launch: Launch, parameters: bytearray) -> None:
        """Run a kernel behind what went before."""
