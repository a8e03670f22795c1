"""The stand-in for CuPy in this process, and as much as devices need of ones for PyTorch and JAX."""

import contextlib
import importlib
import sys
import types
import weakref
from pathlib import Path

import numpy as np

from cubn import _arrays
from cubn._arrays import capsules
from cubn.backends import cuda
from cubn.backends.cuda import capture
from tests.backends import forget_backends

FOLDER = str(Path(__file__).parent / "stand_in")
DEVICE = "cubn.backends.cuda.cupy_device"


@contextlib.contextmanager
def cupy_stand_in(devices=1):
    """The stand-in as `cupy`, and cubn as in a process that has met no CUDA array yet."""
    before, driver = _forget(), capture.driver
    sys.path.insert(0, FOLDER)
    try:
        cupy = importlib.import_module("cupy")
        cupy._machine.become(devices)
        capture.driver = cupy._machine.Libcuda
        yield cupy
    finally:
        capture.driver = driver
        sys.path.remove(FOLDER)
        _GONE.append(_forget())
        sys.modules.update(before)


_GONE = []
"""Modules of earlier stand-ins: there may still be capsules of theirs, which call them."""


def _forget():
    names = [name for name in sys.modules if name == DEVICE or name.partition(".")[0] == "cupy"]
    for known in (_arrays._DESCRIBERS, _arrays.SIGNATURES):
        for kind in [kind for kind in known if kind.__module__ == "cupy"]:
            del known[kind]
    cuda.__dict__.pop("cupy_device", None)
    cuda._backend.cache_clear()
    capsules._read_on.clear()
    forget_backends()
    if device := sys.modules.get(DEVICE):
        device._IN_FLIGHT.clear()  # the capsules among it have finalizers in Python, which must run before it ends
    return {name: sys.modules.pop(name) for name in names}


class Torch(types.ModuleType):
    """PyTorch, as far as CupyDevice asks it: streams, and an allocator with a pool for each."""

    uint8 = "uint8"
    float64 = "float64"

    def __init__(self, cupy):
        super().__init__("torch")
        self._cupy = cupy
        self._pool = cupy.cuda.MemoryPool()
        self._current = cupy.cuda.Stream.null
        self._C = types.SimpleNamespace(_cuda_getCurrentRawStream=lambda index: self._current.ptr)
        self.cuda = types.SimpleNamespace(
            current_stream=lambda index: types.SimpleNamespace(cuda_stream=self._current.ptr)
        )

    @contextlib.contextmanager
    def on(self, stream):
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def empty(self, size, dtype, device):
        with self._cupy.cuda.Device(int(str(device).partition(":")[2])), self._current:
            return Tensor(self, self._pool.malloc(max(size, 1)), (size,), dtype)


class Tensor:
    def __init__(self, torch, memory, shape, dtype):
        self._torch, self._memory, self.shape, self.dtype = torch, memory, shape, dtype
        self.device = f"cuda:{memory.device_id}"

    def new_empty(self, size):
        return self._torch.empty(size, self.dtype, self.device)

    def data_ptr(self):
        return self._memory.ptr

    def untyped_storage(self):
        return self

    def set_(self, storage, offset, shape, strides):
        self._memory, self.shape, self.strides = (
            storage._memory + offset * np.dtype(self.dtype).itemsize,
            shape,
            strides,
        )
        return self


class Jax(types.ModuleType):
    """JAX and XLA below it: a stream that nobody else knows, and memory that is dropped once its last reader is on that
    stream, not once it is done, and used again there.
    """

    def __init__(self, cupy):
        super().__init__("jax")
        self._cupy = cupy
        self._memory = []
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._ready = cupy.cuda.Stream(non_blocking=True)  # of arrays that it takes over
        self.Array = type("Array", (_Array,), {"jax": self})
        self.ShapeDtypeStruct = type("ShapeDtypeStruct", (), {})
        self.core = types.SimpleNamespace(Tracer=type("Tracer", (), {}))
        self.dlpack = types.SimpleNamespace(from_dlpack=self._take_over)
        self.enable_x64 = lambda on: contextlib.nullcontext()
        self.ensure_compile_time_eval = contextlib.nullcontext
        self.disable_jit = lambda disable: contextlib.nullcontext()
        self.when_compiled_runs = lambda: None

    def device_put(self, values, device=None):
        values = np.array(values)
        return self._made(values.shape, values.dtype, lambda: values)

    def read(self, x):
        """An array of x's values, which XLA reads when its stream gets there."""
        return self.jit(lambda values: values).lower(x).compile()(x)

    def jit(self, function):
        def call(x):
            self.when_compiled_runs()
            source = x.host  # which does not keep x's memory
            self.stream.wait_event(x.defined)
            return self._made(x.shape, x.dtype, lambda: function(source))

        compiled = types.SimpleNamespace(compile=lambda: call)
        return types.SimpleNamespace(lower=lambda x: compiled)

    def _made(self, shape, dtype, values):
        """A new array, of what XLA finds when its stream gets there."""
        memory = self._cupy.ndarray(shape, dtype, self._new(int(np.prod(shape)) * dtype.itemsize))
        to = memory._host
        self._cupy._machine.queue(self.stream.ptr).give(lambda: np.copyto(to, values()))
        return self.Array(memory, self.stream.record())

    def _new(self, size):
        memory = self._cupy.cuda.Memory(size)
        self._memory.append(memory)
        owner = _Owner()
        overwrite = self._cupy.cuda.runtime.memsetAsync
        weakref.finalize(owner, overwrite, memory.ptr, 0xDD, size, self.stream.ptr).atexit = False
        held = self._cupy.cuda.UnownedMemory(memory.ptr, size, owner, memory.device_id)
        return self._cupy.cuda.MemoryPointer(held, 0)

    def _take_over(self, exporter):
        capsule = exporter.__dlpack__(stream=self._ready.ptr, max_version=(1, 0))
        tensor, shape, drop = self._cupy._capsule.take_over(capsule)
        dtype = np.dtype({0: "i", 1: "u", 2: "f"}[tensor.code] + str(tensor.bits // 8))
        owner = _Owner()
        weakref.finalize(owner, drop).atexit = False
        size = max(int(np.prod(shape)), 1) * dtype.itemsize
        held = self._cupy.cuda.UnownedMemory(tensor.data, size, owner, tensor.device_index)
        memory = self._cupy.ndarray(shape, dtype, self._cupy.cuda.MemoryPointer(held, 0))
        return self.Array(memory, self._ready.record())


class _Owner:
    """What goes when memory is dropped."""


class _Array:
    """`memory` is an array of the stand-in's, over memory of XLA's or memory that it took over; `defined` an event."""

    def __init__(self, memory, defined):
        self._memory, self.defined = memory, defined
        self.shape, self.dtype = memory.shape, memory.dtype
        self.device = f"gpu {memory.data.device_id}"
        self.sharding = types.SimpleNamespace(device_set={self.device})

    host = property(lambda self: self._memory._host)

    def is_deleted(self):
        return False

    def __dlpack_device__(self):
        return self._memory.__dlpack_device__()

    def __dlpack__(self, *, stream=None, max_version=None):
        self.jax._cupy.cuda.runtime.streamWaitEvent(stream, self.defined.ptr)
        return self._memory.__dlpack__(stream=-1, max_version=max_version)

    def values(self):
        """In NumPy, once they are there."""
        self.defined.synchronize()
        return self.host.copy()
