"""cupy.cuda.function."""

import ctypes
import pickle

import numpy as np

from cupy import _machine
from cupy.cuda import driver


def without_flags(options):
    """What g++ takes of NVRTC's options: definitions."""
    return tuple(option for option in options if option.startswith("-D"))


class Module:
    """Machine code that is loaded on the current device."""

    def load(self, cubin):
        _machine.bind()
        _machine.refuse_unsafe("a module was loaded")
        self.source, options = pickle.loads(cubin)
        self.options = without_flags(options)

    def get_function(self, name):
        return Function(self, name)


class Function:
    def __init__(self, module, name):
        self.module = module
        self.ptr = driver.Function(module.source, name, module.options).handle

    def __call__(self, grid, block, args, shared_mem=0, stream=None):
        from cupy.cuda import get_current_stream

        _machine.bind()
        held = [argument.tobytes() for argument in map(np.asarray, args)]
        pointers = (ctypes.c_char_p * len(held))(*held)
        handle = (get_current_stream() if stream is None else stream).ptr
        extents = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        driver.launchKernel(self.ptr, *extents[0], *extents[1], shared_mem, handle, ctypes.addressof(pointers), 0)
