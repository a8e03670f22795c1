"""What the backend asks of a CUDA device: memory, launches, limits. One small class, so that there can be another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cubn._types import BackendArray
from cubn.backends.cuda.plan import Launch, Limits


class Stream(Protocol):
    """A stream: one object for each, held for as long as it may be used, so that streams are compared by identity."""

    @property
    def handle(self) -> int:
        """CUDA's."""


class Device(Protocol):
    """A device, for the arrays of one library: work goes to that library's current stream."""

    limits: Limits
    index: int

    def stream(self) -> Stream:
        """The current stream of the library."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured in a graph."""

    def wait_for(self, other: Stream) -> None:
        """Work from now on, on the current stream, comes behind all that `other` has so far.

        Nothing where both are one, or while the current stream is being captured.
        """

    def hold(self, *memory: object) -> None:
        """Keep things until the work so far on the current stream is done; while that is captured, for good."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> BackendArray:
        """Memory of its own, dense; it is used in stream order."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> BackendArray:
        """The same, of zeros."""

    def from_host(self, values: Any) -> BackendArray:
        """A copy of a NumPy array of any strides, by way of `staging` unless it is from there, which is kept until it
        is copied: every replay of a graph does so again.
        """

    def to_host(self, array: BackendArray, out: Any = None) -> Any:
        """A copy in NumPy; waits for the work before it."""

    def staging(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Host memory that the device reaches by itself, as a NumPy array; taken from a cache."""

    def beside(self, tables: Sequence[BackendArray]) -> BackendArray:
        """Copies of the tables side by side, in one."""

    def synchronize(self) -> None:
        """Wait for the work before, on this stream alone."""

    def current(self) -> AbstractContextManager[int]:
        """With the device as the CUDA runtime's current one: the stream's address."""

    def address(self, array: BackendArray) -> int:
        """Where an array's first element is."""

    def as_users(self, array: BackendArray) -> Any:
        """The array as the device's library knows arrays, ordered by that library: a PyTorch tensor, a CuPy view; JAX
        gets one of its own.
        """

    def compile(self, launches: Sequence[Launch]) -> None:
        """Have their kernels ready; what is in no cache is compiled, on all cores."""

    def launch(self, launch: Launch, parameters: bytearray, stream: Stream) -> None:
        """Run a kernel behind what went before on the current stream, which is given."""
