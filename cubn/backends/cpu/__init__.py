"""The CPU backend: compiled kernels, run by a pool of threads of our own."""

from __future__ import annotations

import functools

from cubn.backends.cpu.backend import CpuBackend
from cubn.backends.protocol import Backend


@functools.cache
def backend() -> Backend:
    """The one CPU backend of this process."""
    return CpuBackend()
