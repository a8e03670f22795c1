"""The CUDA backend's device, on the CPU: the same kernels, compiled for the host and run thread by thread."""

import contextlib
import functools

import numpy as np

from cubn.backends.cuda.plan import Launch, Limits
from cubn.backends.cuda.source import translation_unit
from tests.cuda_on_cpu import sanitized
from tests.cuda_on_cpu.build import ADDRESS
from tests.cuda_on_cpu.runner import Module

SMALL = Limits(multiprocessors=2, shared_bytes=48 << 10, capability=(9, 0))
"""Limits that make plans for small arrays look as those for large ones do on a large device."""


@functools.cache
def module(source: str, kernel: str, options: tuple[str, ...]) -> Module:
    sanitizer = sanitized.active()
    optimize = "-O0" if sanitizer == ADDRESS else "-O1"  # compiling takes most of the time, and no access is left out
    return Module(translation_unit(source), kernel, options, sanitizer, optimize)


class CpuDevice:
    """See cubn.backends.cuda.device.Device. `order` is the order in which threads run; see runner.Order."""

    index = 0

    def __init__(self, limits: Limits = SMALL, order: int = 0) -> None:
        self.limits = limits
        self.order = order
        self.launched: list[Launch] = []
        self.synchronized = 0

    def stream(self):
        return self

    def empty(self, shape, dtype):
        """Filled with what no test expects: 0xff in every byte is NaN, or -1."""
        array = np.empty(shape, dtype)
        array.view(np.uint8).fill(0xFF) if array.shape else array.fill(-1)
        return array

    def zeros(self, shape, dtype):
        return np.zeros(shape, dtype)

    def from_host(self, values):
        return np.array(values)

    def to_host(self, array, out=None):
        out = np.empty_like(array) if out is None else out
        out[...] = array
        return out

    def staging(self, shape, dtype):
        return self.empty(shape, dtype)

    def beside(self, tables):
        return np.hstack(tables)

    def synchronize(self):
        self.synchronized += 1

    def current(self):
        return contextlib.nullcontext(0)

    def address(self, array):
        return array.ctypes.data

    def launch(self, launch, parameters, stream):
        self.launched.append(launch)
        module(launch.source, launch.kernel, launch.options).launch(
            (launch.grid, 1, 1),
            (launch.threads, 1, 1),
            [parameters],
            shared_bytes=launch.shared_bytes,
            cluster=launch.cluster,
            order=self.order,
        )
