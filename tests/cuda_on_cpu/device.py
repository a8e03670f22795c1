"""The CUDA backend's device, on the CPU: the same kernels, compiled for the host and run thread by thread."""

import contextlib
import functools
import sys
import threading

import numpy as np

from cubn.backends.cuda.plan import Launch, Limits
from cubn.backends.cuda.source import translation_unit
from tests.cuda_on_cpu import sanitized
from tests.cuda_on_cpu.ordering import CpuStream, accesses
from tests.cuda_on_cpu.runner import Module

SMALL = Limits(multiprocessors=2, shared_bytes=48 << 10, capability=(9, 0))
"""Limits that make plans for small arrays look as those for large ones do on a large device."""


@functools.cache
def module(source: str, kernel: str, options: tuple[str, ...]) -> Module:
    """Not optimized: compiling takes most of the time, and no access is left out."""
    return Module(translation_unit(source), kernel, options, sanitized.active(), "-O0")


class CaptureError(RuntimeError):
    """What cannot be done while a stream is captured in a graph."""


class CpuDevice:
    """See cubn.backends.cuda.device.Device. `order` is the order in which threads run; see runner.Order.

    With an `ordering`, it writes down there what it does on which stream; its current one is then the test's to set.
    """

    index = 0

    def __init__(self, limits: Limits = SMALL, order: int = 0, library: str = "numpy", ordering=None) -> None:
        self.limits = limits
        self.order = order
        self.library = library
        self.ordering = ordering
        self.default_stream = CpuStream(library)
        self._of_thread = threading.local()
        self.launched: list[Launch] = []
        self.synchronized = 0

    # --- streams ------------------------------------------------------------------------------------------------------

    def stream(self):
        return getattr(self._of_thread, "stream", self.default_stream)

    def capturing(self):
        return self.stream().captured

    def wait_for(self, other):
        stream = self.stream()
        if self.ordering is None or other is stream or stream.captured:
            return
        if other.captured:
            raise CaptureError(f"{stream} would be taken into the capture of {other}")
        self.ordering.wait(stream, other)

    def hold(self, *memory):
        if self.ordering is not None:
            self.ordering.hold(*memory)

    @contextlib.contextmanager
    def on(self, stream):
        """With another stream as the library's current one in this thread."""
        before, self._of_thread.stream = self.stream(), stream
        try:
            yield stream
        finally:
            self._of_thread.stream = before

    def synchronize(self):
        self._refuse_captured("a synchronization")
        self.synchronized += 1
        if self.ordering is not None:
            self.ordering.synchronize(self.stream())

    def current(self):
        return contextlib.nullcontext(self.stream().handle)

    # --- memory -------------------------------------------------------------------------------------------------------

    def empty(self, shape, dtype):
        """Filled with what no test expects: 0xff in every byte is NaN, or -1."""
        return self._new(shape, dtype, self.stream(), "memory")

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array[...] = 0
        self._does("memset", writes=(array,))
        return array

    def from_host(self, values):
        source = np.asarray(values)
        if self.ordering is not None and not self.ordering.is_own(source):
            source = self.staging(source.shape, source.dtype)
            source[...] = values
        array = self.empty(source.shape, source.dtype)
        array[...] = source
        if self.ordering is not None:
            self.ordering.copies += 1
        self._does("copy from the host", reads=(source,), writes=(array,))
        self.hold(source)
        return array

    def to_host(self, array, out=None):
        self._refuse_captured("a copy that the host waits for")
        out = np.empty_like(array, subok=False) if out is None else out
        out[...] = array
        self._does("copy to the host", reads=(array,))
        if self.ordering is not None:
            self.ordering.synchronize(self.stream())
        return out

    def staging(self, shape, dtype):
        return self._new(shape, dtype, None, "staging memory")

    def beside(self, tables):
        joined = self.empty((len(tables[0]), sum(table.shape[1] for table in tables)), tables[0].dtype)
        np.concatenate(tables, axis=1, out=joined)
        self._does("copies side by side", reads=tables, writes=(joined,))
        return joined

    def address(self, array):
        return array.ctypes.data

    def as_users(self, array):
        """A view of NumPy's, which stands for CuPy here; PyTorch's own; for JAX a copy."""
        if self.library == "torch":
            return sys.modules["torch"].from_numpy(array)
        return array.copy() if self.library == "jax" else array.view()

    # --- kernels ------------------------------------------------------------------------------------------------------

    def compile(self, launches):
        """Each when it is launched."""

    def launch(self, launch, parameters, stream):
        self.launched.append(launch)
        if self.ordering is not None:
            assert stream is self.stream(), "a launch on a stream that is not the current one"
            self.ordering.operation(stream, launch.kernel, *accesses(launch, parameters))
        module(launch.source, launch.kernel, launch.options).launch(
            (launch.grid, 1, 1),
            (launch.threads, 1, 1),
            [parameters],
            shared_bytes=launch.shared_bytes,
            cluster=launch.cluster,
            order=self.order,
        )

    def _new(self, shape, dtype, birth, name):
        if self.ordering is not None:
            return self.ordering.allocate(shape, dtype, birth, name)
        array = np.empty(shape, dtype)
        array.view(np.uint8).fill(0xFF) if array.shape else array.fill(-1)
        return array

    def _does(self, what, reads=(), writes=()):
        if self.ordering is not None:
            named = ([(array.ctypes.data, "array") for array in arrays] for arrays in (reads, writes))
            self.ordering.operation(self.stream(), what, *named)

    def _refuse_captured(self, what):
        if self.stream().captured:
            raise CaptureError(f"{what} while {self.stream()} is captured in a graph")
