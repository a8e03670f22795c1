"""cupy.cuda.driver."""

import ctypes
import itertools
import os
import re

from cupy import _machine
from tests.cuda_on_cpu.runner import Module as CpuModule

_CLUSTER = re.compile(r"^#define CLUSTER (\d+)", re.MULTILINE)
_ORDER = int(os.environ.get("STAND_IN_ORDER", "0"))
"""Of the threads of kernels: see tests.cuda_on_cpu.runner.Order."""

CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

launched = []
"""(kernel, grid, stream) of every launch."""

_functions = {}
_handles = itertools.count(0x70000000, 16)


class CUDADriverError(RuntimeError):
    """As of CuPy."""


class Function:
    """A kernel that was loaded on a device."""

    def __init__(self, source, kernel, options):
        self.module = CpuModule(source, kernel, options, optimize="-O0")
        self.name, self.context = kernel, _machine.context()
        cluster = _CLUSTER.search(source)
        self.cluster = int(dict(o[2:].split("=", 1) for o in options if "=" in o).get("CLUSTER", 1))
        if cluster:
            self.cluster = int(cluster[1])
        self.attributes = {CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: 48 << 10}
        self.handle = next(_handles)
        _functions[self.handle] = self


def ctxGetCurrent():
    return _machine.context()


def launchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
    """The arguments' bytes are read now, the kernel runs when the stream gets there."""
    function, queue = _functions[f], _machine.queue(stream)
    context = _machine.context()
    if context != function.context or context != _machine.context_of(queue.device):
        raise CUDADriverError(f"CUDA_ERROR_INVALID_CONTEXT: {context:#x}, the function's {function.context:#x}")
    if shared > function.attributes[CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES]:
        raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: shared memory that the function was not told of")
    sizes = function.module.argument_sizes
    pointers = (ctypes.c_void_p * len(sizes)).from_address(parameters)
    arguments = [ctypes.string_at(at, size) for at, size in zip(pointers, sizes, strict=True)]
    launched.append((function.name, (gx, gy, gz), stream))

    def run():
        function.module.launch(
            (gx, gy, gz), (bx, by, bz), arguments, shared_bytes=shared, cluster=function.cluster, order=_ORDER
        )

    queue.give(run)


def funcGetAttribute(attribute, f):
    return _functions[f].attributes.get(attribute, 0)


def funcSetAttribute(f, attribute, value):
    _functions[f].attributes[attribute] = value
