"""The largest cluster of blocks that a device holds, as its driver says: CuPy does not ask."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

from cubn.backends.cuda.plan.launch import CLUSTERS, THREADS

logger = logging.getLogger("cubn")

PROBE = 'extern "C" __global__ void probe() {}\n'
"""A kernel of which the driver is asked. With all the shared memory of a multiprocessor it has one to a block, and all
blocks of all kernels need no more than that, whatever their registers.
"""

MOST_THREADS = 2 * THREADS  # of a block
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of a cluster's dimensions."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_char * 4),
        ("dimensions", ctypes.c_uint * 3),
        ("rest", ctypes.c_char * 52),  # of a union of 64 bytes
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


def largest(function: int, shared_bytes: int, driver: Any = None) -> int:
    """Blocks of the largest cluster of which the current device holds one or more; 1 if the driver does not tell.

    Parts of a device (MIG) and devices with few multiprocessors side by side hold smaller ones than others. `function`:
    a handle of the probe, which was told that it may use so much shared memory.
    """
    found = 1
    try:
        ask = (driver or ctypes.CDLL("libcuda.so.1")).cuOccupancyMaxActiveClusters
        while found < CLUSTERS[-1] and _held(ask, function, 2 * found, shared_bytes):
            found *= 2
    except (OSError, AttributeError) as error:
        reason = str(error)  # whoever keeps the log keeps no frames
        logger.warning("cubn: no clusters of blocks are used on this device: its driver does not tell (%s)", reason)
        found = 1
    return found


def _held(ask: Any, function: int, size: int, shared_bytes: int) -> int:
    """How many clusters of a size the device holds at once."""
    cluster = _Attribute(id=CLUSTER_DIMENSION, dimensions=(size, 1, 1))
    config = _Config((size, 1, 1), (MOST_THREADS, 1, 1), shared_bytes, None, ctypes.pointer(cluster), 1)
    held = ctypes.c_int()
    if status := ask(ctypes.byref(held), ctypes.c_void_p(function), ctypes.byref(config)):
        raise OSError(f"cuOccupancyMaxActiveClusters: CUDA error {status}")
    return held.value
