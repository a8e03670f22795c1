"""What a capture of a graph forbids every thread, unless it says that it knows what it does. CuPy cannot say so."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def driver() -> Any:
    """Its library; None if it is not found under its usual name."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@contextmanager
def relaxed() -> Iterator[None]:
    """Allocate pinned memory, look whether events are done, or load kernels, whatever this or another thread captures.

    PyTorch captures in the mode that forbids it to all threads: it would be an error, and the end of the capture.
    """
    exchange = getattr(driver(), "cuThreadExchangeStreamCaptureMode", None)
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(RELAXED)
    exchange(ctypes.byref(mode))  # which leaves there what it was
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))
