"""Launches the kernels of faults/, each of which is correct but for the fault it is asked for.

`python -m tests.cuda_on_cpu.planted KERNEL FAULT ORDER` does so in a child of sanitized.run().
"""

import re
import struct
import sys
from pathlib import Path

import numpy as np

from tests.cuda_on_cpu.runner import Module
from tests.cuda_on_cpu.sanitized import active

FAULTS = Path(__file__).parent / "faults"
THREADS, BLOCKS, CLUSTER = 64, 8, 4


def launch(kernel: str, fault: str = "none", order: int = 0) -> bool:
    """Whether the kernel's result is what it is without a fault."""
    launches = {"warps": _warps, "reverse": _reverse, "total": _total, "exchange": _exchange}
    return launches[kernel](_module(kernel, fault), order)


def _module(kernel: str, fault: str) -> Module:
    source = (FAULTS / f"{kernel}.cu").read_text()
    if not re.search(rf"\b{fault} = \d", source):
        raise ValueError(f"{kernel}.cu has no fault {fault}")
    return Module(source, kernel, [f"-DFAULT={fault}", f"-DTHREADS={THREADS}"], active(), "-O0")


def _warps(module: Module, order: int) -> bool:
    x = np.arange(BLOCKS * THREADS, dtype=np.int32)
    y = np.zeros_like(x)
    module.launch((BLOCKS,), (THREADS,), [struct.pack("PP", x.ctypes.data, y.ctypes.data)], order=order)
    return np.array_equal(y, np.where((x ^ 31) % 32 < 16, x ^ 31 ^ 1, x ^ 31))


def _reverse(module: Module, order: int) -> bool:
    x = np.random.default_rng(0).standard_normal(2 * THREADS, np.float32)
    y = np.zeros_like(x)
    parameters = struct.pack("PPi4x", x.ctypes.data, y.ctypes.data, x.size)
    module.launch((2,), (THREADS,), [parameters], shared_bytes=4 * THREADS, order=order)
    return np.array_equal(y, x.reshape(2, THREADS)[:, ::-1].reshape(-1))


def _total(module: Module, order: int) -> bool:
    x = np.arange(BLOCKS * THREADS, dtype=np.int64) ** 2
    y, partial, tickets = np.zeros(1, np.int64), np.zeros(BLOCKS, np.int64), np.zeros(1, np.uint32)
    parameters = struct.pack("PPPP", *(array.ctypes.data for array in (x, y, partial, tickets)))
    module.launch((BLOCKS,), (THREADS,), [parameters], order=order)
    return int(y[0]) == int(x.sum())


def _exchange(module: Module, order: int) -> bool:
    x = np.random.default_rng(0).integers(0, 1 << 28, BLOCKS * THREADS, np.int32)
    y = np.zeros_like(x)
    parameters = struct.pack("PP", x.ctypes.data, y.ctypes.data)
    module.launch((BLOCKS,), (THREADS,), [parameters], shared_bytes=4 * THREADS, cluster=CLUSTER, order=order)
    sums = x.reshape(-1, CLUSTER, THREADS).sum(1, keepdims=True, dtype=np.int32)
    return np.array_equal(y.reshape(-1, CLUSTER, THREADS), np.broadcast_to(sums, (BLOCKS // CLUSTER, CLUSTER, THREADS)))


if __name__ == "__main__":
    sys.exit(0 if launch(sys.argv[1], sys.argv[2], int(sys.argv[3])) else "another result")
