"""A stand-in for CuPy: what cubn and its tests use of it, over the host's memory. See README.md beside it."""

import ctypes
import math

import numpy as np

from cupy import _capsule, _machine, cuda
from cupy._machine import lazily
from cupy._memory import get_default_memory_pool

__version__ = "14.2.0+stand.in"

own_kernels = []
"""What CuPy would have compiled kernels of its own for, by name; their headers may not be there."""

__all__ = ["RawKernel", "RawModule", "arange", "array", "asarray", "copyto", "cuda", "empty", "empty_like", "full"]
__all__ += ["get_default_memory_pool", "lazily", "ndarray", "ones", "zeros", "zeros_like"]


class ndarray:
    """An array on a device. Arithmetic, which only tests do with it, is done at once behind the current stream."""

    __slots__ = ("__weakref__", "_host", "data")

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
        self.data = cuda.alloc(math.prod(shape) * dtype.itemsize) if memptr is None else memptr
        self._host = _numpy_at(self.data.ptr, shape, dtype, strides)

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    size = property(lambda self: self._host.size)
    ndim = property(lambda self: self._host.ndim)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    flags = property(lambda self: self._host.flags)
    device = property(lambda self: self.data.device)
    T = property(lambda self: self._like(self._host.T))

    def _like(self, host):
        """An array over a part of this one's memory."""
        memory = cuda.MemoryPointer(self.data.mem, host.ctypes.data - self.data.mem.ptr if host.size else 0)
        return ndarray(host.shape, host.dtype, memory, host.strides)

    def __getitem__(self, key):
        return self._like(self._host[key][...] if self._host[key].ndim == 0 else self._host[key])

    def view(self, dtype=None):
        return self._like(self._host.view() if dtype is None else self._host.view(dtype))

    def reshape(self, *shape):
        host = self._host.reshape(*shape)
        assert np.shares_memory(host, self._host) or not host.size
        return self._like(host)

    def ravel(self):
        return self.reshape(-1)

    def transpose(self, *axes):
        return self._like(self._host.transpose(*axes))

    def __setitem__(self, key, value):
        source = value._host if isinstance(value, ndarray) else np.array(value)
        own_kernels.append("__setitem__")
        _current().give(lambda: self._host.__setitem__(key, source))

    def get(self, stream=None, order="C", out=None, blocking=True):
        stream = stream or cuda.get_current_stream()
        if out is None:
            out = np.empty(self.shape, self.dtype)
        elif self.dtype != out.dtype or self.shape != out.shape:
            raise ValueError("out of another dtype or shape")
        queue = _machine.queue(stream.ptr)
        if queue.captured is not None:
            raise RuntimeError("the current stream is capturing, so D2H transfers are disallowed")
        if not self.flags.c_contiguous:
            own_kernels.append("get")
        queue.give(lambda: np.copyto(out, self._host))
        if blocking:
            stream.synchronize()
        return out

    def set(self, arr, stream=None):
        stream = stream or cuda.get_current_stream()
        if self.dtype != arr.dtype or self.shape != arr.shape:
            raise ValueError("an array of another dtype or shape")
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        held = np.array(arr) if type(arr) is np.ndarray else np.ascontiguousarray(arr)  # pageable memory is staged
        self.data.copy_from_host_async(held.ctypes.data, self.nbytes, stream)
        _machine.queue(stream.ptr).give(lambda: held is None)  # kept until then, if it was staged

    def __dlpack_device__(self):
        return 2, self.data.device_id

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if stream != -1:
            event = cuda.get_current_stream().record()
            cuda.runtime.streamWaitEvent(_machine.LEGACY if stream is None else stream, event.ptr)
        return _capsule.export(self, max_version is not None and max_version[0] >= 1)

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __len__(self):
        return len(self._host)

    def __repr__(self):
        return repr(_done(self))

    __hash__ = None


def _numpy_at(address, shape, dtype, strides):
    """A NumPy array over memory."""
    if 0 in shape:
        return np.empty(shape, dtype)
    steps = strides or np.empty(shape, np.byte).strides if dtype.itemsize == 1 else strides
    if steps is None:
        low, high = 0, math.prod(shape) * dtype.itemsize
    else:
        reach = [(extent - 1) * step for extent, step in zip(shape, steps, strict=True)]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + dtype.itemsize
    return np.ndarray(shape, dtype, (ctypes.c_char * (high - low)).from_address(address + low), -low, strides)


def _current():
    return _machine.queue(cuda.get_current_stream().ptr)


def _done(x):
    """An array's values, once the current stream is done."""
    if not isinstance(x, ndarray):
        return x
    queue = _current()
    queue.give(lambda: None)
    queue.reach(queue.given)
    return x._host


def _operation(name):
    def operation(*arguments, **options):
        own_kernels.append(name)
        return array(getattr(_done(arguments[0]), name)(*map(_done, arguments[1:]), **options))

    return operation


for _name in (
    *("__abs__", "__neg__", "__invert__", "astype", "copy", "all", "any", "sum", "min", "max", "mean", "fill"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__and__", "__or__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
):
    setattr(ndarray, _name, _operation(_name))
for _name in ("tolist", "item", "__bool__", "__int__", "__float__"):
    setattr(ndarray, _name, lambda self, *arguments, name=_name: getattr(_done(self), name)(*arguments))


# --- functions --------------------------------------------------------------------------------------------------------


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype)


def full(shape, value, dtype=None):
    return array(np.full(shape, value, dtype))


def zeros(shape, dtype=float):
    return array(np.zeros(shape, dtype))


def ones(shape, dtype=float):
    return array(np.ones(shape, dtype))


def arange(*arguments, **options):
    return array(np.arange(*arguments, **options))


def array(values, dtype=None, copy=True):
    host = np.array(_done(values), dtype, order="C")
    found = ndarray(host.shape, host.dtype)
    _current().give(lambda: np.copyto(found._host, host))
    return found


def asarray(values, dtype=None):
    return values if isinstance(values, ndarray) and dtype in (None, values.dtype) else array(values, dtype)


def empty_like(x):
    return ndarray(x.shape, x.dtype)


def zeros_like(x):
    return zeros(x.shape, x.dtype)


def copyto(to, source):
    _current().give(lambda: np.copyto(to._host, source._host))


class RawModule:
    """Text that is compiled for the device on which its kernels are used first."""

    def __init__(self, *, code, options=(), **_):
        self._code, self._options = code, tuple(options)

    def get_function(self, name):
        return RawKernel(self._code, name, self._options)


class RawKernel:
    def __init__(self, code, name, options=()):
        self._cubin = cuda.nvrtc.getCUBIN([code, tuple(options)])
        self._name, self._loaded = name, {}

    @property
    def kernel(self):
        index = _machine.device()
        if index not in self._loaded:
            module = cuda.function.Module()
            module.load(self._cubin)
            self._loaded[index] = module.get_function(self._name)
        return self._loaded[index]

    def __call__(self, grid, block, args, **options):
        self.kernel(grid, block, args, **options)

    @property
    def shared_size_bytes(self):
        return cuda.driver.funcGetAttribute(cuda.driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self.kernel.ptr)

    def _more_shared_bytes(self, size):
        attribute = cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        cuda.driver.funcSetAttribute(self.kernel.ptr, attribute, size)

    max_dynamic_shared_size_bytes = property(None, _more_shared_bytes)
