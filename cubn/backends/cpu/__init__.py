"""The CPU backend: kernels compiled by numba, run by a pool of threads of our own."""

from __future__ import annotations

import functools

from cubn.backends import Backend
from cubn.backends.cpu.backend import CpuBackend


@functools.cache
def backend() -> Backend:
    """The one CPU backend of this process."""
    return CpuBackend()
