"""What is no array, or none that any operation takes: makers of it, given an array that would be right."""

from __future__ import annotations

import array
import ctypes
import math
import types

import jax
import numpy as np
import torch

from tests.fuzz import producer

KIND = (TypeError,)
RANGE = (ValueError,)
BOTH = (TypeError, ValueError)


def made_once(make):
    """For values that take long to make and are changed by nobody: one for each shape."""
    kept = {}

    def of(a):
        if a.shape not in kept:
            kept[a.shape] = make(a)
        return kept[a.shape]

    return of


class Raises:
    """Whoever asks it for anything gets an error of its own."""

    def __getattr__(self, name):
        raise ZeroDivisionError(name)

    def _raise(self, *arguments, **options):
        raise ZeroDivisionError

    __index__ = __float__ = __int__ = __len__ = __iter__ = __bool__ = __eq__ = __array__ = __dlpack__ = _raise
    __dlpack_device__ = __repr__ = _raise
    __hash__ = object.__hash__


class Subclass(np.ndarray):
    """An array that may mean anything."""


class Tensor(torch.Tensor):
    """A tensor that dispatches by itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return NotImplemented


def misaligned(a):
    memory = np.zeros(a.nbytes + a.itemsize + 1, np.uint8)
    view = memory[1 : 1 + a.nbytes]
    view = view if view.ctypes.data % a.itemsize else memory[2 : 2 + a.nbytes]
    return view.view(a.dtype).reshape(a.shape)


def _between_elements(a):
    """Steps that are no whole number of elements."""
    memory = np.zeros((a.nbytes // a.itemsize) * (a.itemsize + 1) + a.itemsize, np.uint8)
    strides = np.array(np.zeros(a.shape, np.uint8).strides) * (a.itemsize + 1)
    return np.ndarray(a.shape, a.dtype, memory, 0, tuple(int(s) for s in strides))


@made_once
def _deleted(a):
    x = jax.numpy.array(a)
    x.delete()
    return x


@made_once
def _tracer(a):
    found = []
    jax.make_jaxpr(lambda x: found.append(x) or x)(np.zeros(a.shape, np.float32))
    return found[0]


def _freed(a):
    x = torch.zeros(a.size + 8)[8:].reshape(a.shape)
    x.untyped_storage().resize_(0)
    return x


@made_once
def _fake(a):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(a.shape)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def _exporter(**fields):
    """An exporter that says other things than NumPy does."""

    def make(a):
        foreign = producer.Foreign(np.ascontiguousarray(a))
        known = vars(foreign.fields) | fields
        foreign.fields = producer.Fields(**known)
        return foreign

    return make


def _saying(device=(1, 0), result=None, error=None):
    """An exporter whose methods return or raise something."""

    class Exporter:
        def __dlpack_device__(self):
            return device

        def __dlpack__(self, **options):
            if error:
                raise error
            return result

    return lambda a: Exporter()


NO_ARRAYS = {
    "a list": lambda a: a.tolist(),
    "a nested tuple": lambda a: tuple(a.tolist()) if a.ndim else (),
    "text": lambda a: "x",
    "bytes": lambda a: a.tobytes(),
    "an integer": lambda a: 3,
    "a huge integer": lambda a: 10**400,
    "a float": lambda a: 0.5,
    "nan": lambda a: math.nan,
    "an object": lambda a: object(),
    "a class": lambda a: np.ndarray,
    "a function": lambda a: np.zeros,
    "a module": lambda a: np,
    "Ellipsis": lambda a: ...,
    "NotImplemented": lambda a: NotImplemented,
    "a dictionary": lambda a: {"data": a},
    "a set": lambda a: {1},
    "a NumPy scalar": lambda a: np.float32(1),
    "a complex number": lambda a: 1j,
    "a memoryview": lambda a: memoryview(np.ascontiguousarray(a)),
    "an array.array": lambda a: array.array("f", [1, 2, 3, 4]),
    "a ctypes array": lambda a: (ctypes.c_float * 4)(),
    "a generator": lambda a: (i for i in range(3)),
    "__array_interface__ only": lambda a: types.SimpleNamespace(__array_interface__=a.__array_interface__),
    "__dlpack__ of the instance": lambda a: types.SimpleNamespace(__dlpack__=a.__dlpack__),
}
OTHER_DTYPES = ["i4", "i8", "u1", "c8", "c16", "O", "S3", "U2", "M8[s]", "m8[s]", "longdouble", ">f4", ">f8", "V8"]
OTHER_ARRAYS = {
    "a masked array": (np.ma.array, KIND),
    "a subclass": (lambda a: a.view(Subclass), KIND),
    "a recarray": (lambda a: a.view(np.recarray), KIND),
    "a structured array": (lambda a: np.zeros(a.shape, [("a", "f4")]), KIND),
    "misaligned": (misaligned, RANGE),
    "between elements": (_between_elements, RANGE),
    "sparse": (lambda a: torch.zeros(a.shape).to_sparse(), KIND),
    "meta": (lambda a: torch.zeros(a.shape, device="meta"), (NotImplementedError,)),
    "an integer tensor": (lambda a: torch.zeros(a.shape, dtype=torch.int32), KIND),
    "a complex tensor": (lambda a: torch.zeros(a.shape, dtype=torch.complex64).conj(), KIND),
    "fp8": (lambda a: torch.zeros(a.shape).to(torch.float8_e4m3fn), KIND),
    "a fake tensor": (_fake, KIND),
    "a freed tensor": (_freed, BOTH),
    "an uninitialised parameter": (lambda a: torch.nn.UninitializedParameter(), BOTH),
    "a tensor class": (lambda a: torch.zeros(a.shape).as_subclass(Tensor), KIND),
    "a deleted JAX array": (_deleted, RANGE),
    "a tracer": (_tracer, KIND),
    "JAX keys": (made_once(lambda a: jax.random.split(jax.random.key(0), 4)), KIND),
    "pinned memory": (_exporter(device=(3, 0)), (NotImplementedError,)),
    "metal": (_exporter(device=(8, 0)), (NotImplementedError,)),
    "lanes": (_exporter(lanes=2), KIND),
    "DLPack 2": (_exporter(version=(2, 0)), (BufferError,)),
    "a used capsule": (_exporter(name=b"used_dltensor_versioned"), (BufferError,)),
    "no capsule": (_saying(), (BufferError,)),
    "an exporter that refuses": (_saying(error=BufferError("no")), (BufferError,)),
    "an exporter that fails": (_saying(error=ZeroDivisionError()), (BufferError, ZeroDivisionError)),
    "a device that is none": (_saying(device=None), BOTH),
    "a device of text": (_saying(device=("cpu", 0)), BOTH),
    "raises": (lambda a: Raises(), (ZeroDivisionError, BufferError, *BOTH)),
}
