"""CUDA backends of several array libraries, on the CPU, with a stream for each library."""

from cubn._types import CPU
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.shared import among
from tests.cuda_on_cpu.device import SMALL, CpuDevice
from tests.cuda_on_cpu.ordering import CpuStream, Ordering

OWN_STREAMS = ("numpy", "torch")
"""Libraries with a current stream; NumPy's arrays stand for CuPy's. Any other's work goes to the null stream."""


class Devices:
    """The devices of all libraries, which make their backends, and the order of what is done there."""

    def __init__(self, limits=SMALL, order=0, own_streams=OWN_STREAMS):
        self.ordering = Ordering()
        self._options = limits, order
        self._own_streams = own_streams
        self._null = CpuStream("null")
        self._devices = {}
        self._backends = {}

    def device(self, library):
        device = self._devices.get(library)
        if device is None:
            device = self._devices[library] = CpuDevice(*self._options, library, self.ordering)
            if library not in self._own_streams:
                device.default_stream = self._null
        return device

    def backend(self, index, *libraries):
        """In the place of `cubn.backends.cuda.backend`."""
        if libraries not in self._backends:
            several = len(libraries) > 1
            self._backends[libraries] = (
                among(*(self.backend(index, library) for library in libraries))
                if several
                else CudaBackend(self.device(*libraries))
            )
        return self._backends[libraries]

    def use(self, monkeypatch):
        """Let memory of the host count as a CUDA device's."""
        monkeypatch.setattr("cubn.backends.CPU", None)
        monkeypatch.setattr("cubn.backends.CUDA", CPU)
        monkeypatch.setattr("cubn.backends.cuda.backend", self.backend)
