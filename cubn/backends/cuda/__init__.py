"""The CUDA backend: the kernels of `kernels/`, planned, specialised and launched."""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.shared import among

_making = threading.RLock()


def backend(index: int, library: str = "", *others: str) -> CudaBackend:
    """The backend of a device, for arrays of a library: on that library's stream, in its memory where it says so.

    Where there are arrays of others too, their streams and this one wait for each other.

    Raises
    ------
    ImportError
        Without CuPy.
    BackendUnavailable
        Without a driver or such a device, or on one that is too old.
    """
    with _making:  # one for all threads, which know it and its streams by their identity
        return _backend(index, library, *others)


@functools.cache
def _backend(index: int, library: str, *others: str) -> CudaBackend:
    if others:
        return among(*(backend(index, name) for name in (library, *others)))
    from cubn.backends.cuda.cupy_device import CupyDevice

    return CudaBackend(CupyDevice(index, library))


def new_buffer(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, index: int) -> Any:
    """A CuPy array of its own memory, with these strides in bytes; its elements fill it."""
    from cubn.backends.cuda import cupy_device

    return cupy_device.new_buffer(shape, strides, dtype, index)


def capsule_of(buffer: Any, **options: Any) -> Any:
    """The DLPack capsule of a `new_buffer`, ordered behind the work of the backend that wrote it."""
    from cubn.backends.cuda import cupy_device

    return cupy_device.capsule_of(buffer, **options)


def host_copy(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, index: int) -> Any:
    """What is in a device's memory, in NumPy; strides in bytes. Waits for the work before it."""
    from cubn.backends.cuda import cupy_device

    return cupy_device.host_copy(pointer, shape, strides, dtype, index)


def hold(things: tuple[object, ...], index: int) -> None:
    """Keep things until the backends' work so far on arrays that are read through capsules is done."""
    cupy_device = sys.modules.get("cubn.backends.cuda.cupy_device")
    if cupy_device is not None:  # else there is none
        cupy_device.hold(things, index)
