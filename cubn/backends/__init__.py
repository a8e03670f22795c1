"""What computes: one backend for each kind of device."""

from __future__ import annotations

from functools import cache

from cubn._arrays.capsules import DeviceMemory, provide
from cubn._types import CPU, CUDA
from cubn.backends.protocol import Backend
from cubn.errors import BackendUnavailable


@cache
def backend_for(device: tuple[int, int], *libraries: str) -> Backend:
    """The backend of a DLPack device (type, index), for arrays of these libraries: CUDA work goes to the stream of the
    first, behind the work on those of the others, whose work from then on comes behind it.

    Raises
    ------
    ImportError
        If what the backend is made with is not installed.
    BackendUnavailable
        If it is, and does not work here.
    """
    kind, index = device
    if kind == CPU:
        from cubn.backends import cpu

        return cpu.backend()
    if kind == CUDA:
        from cubn.backends import cuda

        return cuda.backend(index, *libraries)
    raise BackendUnavailable(f"cubn: there is no backend for DLPack device type {kind}. Move the arrays to the CPU")


def _cuda_memory() -> DeviceMemory:
    from cubn.backends import cuda

    return cuda


provide(CUDA, _cuda_memory)
