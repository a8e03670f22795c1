"""What the backend asks of a CUDA device: memory, launches, limits. One small class, so that there can be another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cubn._types import BackendArray
from cubn.backends.cuda.plan import Launch, Limits


class Device(Protocol):
    """A device and the stream that work on it goes to."""

    limits: Limits
    index: int

    def empty(self, shape: tuple[int, ...], dtype: str) -> BackendArray:
        """Memory of its own, dense; it is used in stream order."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> BackendArray:
        """The same, of zeros."""

    def from_host(self, values: Any) -> BackendArray:
        """A copy of a NumPy array of any strides; one of `staging` is kept until it is copied."""

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

    def compile(self, launches: Sequence[Launch]) -> None:
        """Have their kernels ready; what is in no cache is compiled, on all cores."""

    def launch(self, launch: Launch, parameters: bytearray) -> None:
        """Run a kernel behind what went before."""
