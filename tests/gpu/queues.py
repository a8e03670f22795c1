"""Streams of PyTorch and CuPy that are busy for a while, so that what does not wait for them is too early."""

import numpy as np

from tests.gpu import device_arrays
from tests.gpu.needs import need

CYCLES = 400_000_000  # of a multiprocessor: some tenths of a second
ROUNDS = 8_000_000  # of some tens of cycles each

COUNT = r"""
extern "C" __global__ void count(long long rounds) {
    for (volatile long long i = 0; i < rounds; i = i + 1) {}
}
"""


def keep_busy():
    """CuPy's current stream."""
    import cupy

    cupy.RawKernel(COUNT, "count")((1,), (1,), (np.int64(ROUNDS),))


class Torch:
    """What tests need of PyTorch: a stream, and arrays that are written and read on the current one."""

    def __init__(self):
        need("torch")
        import torch

        self.torch = torch
        self.stream = torch.cuda.Stream()

    def current(self):
        """A context in which the stream is PyTorch's current one."""
        return self.torch.cuda.stream(self.stream)

    def busy(self):
        """Keep it so, and return a function that tells whether the stream has come this far."""
        self.torch.cuda._sleep(CYCLES)
        return self.stream.record_event().query

    carry = staticmethod(device_arrays.to_torch)

    def copy(self, to, source):
        to.copy_(source)

    def zeros_like(self, array):
        return self.torch.zeros_like(array)

    def to_host(self, array):
        """Behind the current stream alone, as any user reads it."""
        return array.cpu().numpy()

    def graph_of(self, step, warm_ups=1):
        """What a step gives that was captured after warm-ups, all done, and a function that replays it and waits."""
        with self.current():
            for _ in range(warm_ups):
                step()
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            given = step()

        def replay():
            graph.replay()
            self.torch.cuda.synchronize()

        return given, replay


class Cupy:
    """The same of CuPy."""

    def __init__(self):
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def current(self):
        return self.stream

    def busy(self):
        keep_busy()
        event = self.stream.record()
        return lambda: event.done

    carry = staticmethod(device_arrays.to_cupy)

    def copy(self, to, source):
        self.cupy.copyto(to, source)

    def zeros_like(self, array):
        return self.cupy.zeros_like(array)

    def to_host(self, array):
        return array.get()

    def graph_of(self, step, warm_ups=1):
        """CuPy's graphs do not own memory: a pool that nothing else uses, warmed up and kept, does."""
        pool = self.cupy.cuda.MemoryPool()
        self.cupy.cuda.runtime.deviceSynchronize()
        with self.cupy.cuda.using_allocator(pool.malloc), self.stream:
            for _ in range(warm_ups):
                step()
            self.stream.begin_capture()
            given = step()
            graph = self.stream.end_capture()
        self.stream.synchronize()

        def replay(pool=pool):
            self.cupy.cuda.runtime.deviceSynchronize()
            graph.launch(self.stream)
            self.stream.synchronize()

        return given, replay
