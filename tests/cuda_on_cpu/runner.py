"""CUDA C++ modules that are compiled for, and launched on, the CPU."""

import ctypes
import enum
from collections.abc import Sequence

from tests.cuda_on_cpu.build import PLAIN, build_kernel, build_runtime
from tests.cuda_on_cpu.sanitized import active


class LaunchError(RuntimeError):
    """A launch that was refused, or stopped by what its threads did."""


class Order(enum.IntFlag):
    """The order in which CUDA threads run; `shuffled` gives further ones."""

    ASCENDING = 0
    REVERSED_WARPS = 1
    REVERSED_LANES = 2
    REVERSED_BLOCKS = 4
    REVERSED = 7


def shuffled(seed: int) -> int:
    """An order in which lanes, warps and blocks are permuted pseudo-randomly, anew after every barrier."""
    return 8 | (seed & (1 << 60) - 1) << 4


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        ("argument_sizes", ctypes.POINTER(ctypes.c_ulong)),
        ("argument_count", ctypes.c_uint),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("cooperative", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("dynamic_bytes", ctypes.c_uint64),
        ("order", ctypes.c_uint64),
    )


class Module:
    """One translation unit of CUDA C++ and its one kernel.

    Parameters
    ----------
    source : str
        The complete text, as NVRTC would get it.
    kernel : str
        The name of its `extern "C" __global__` function.
    options : sequence of str
        Further flags for g++, such as "-DNAME=VALUE".
    sanitizer : str
        "", "address,undefined" or "thread"; the latter two only in a process that sanitized.run() started.
    optimize : str
        g++'s optimisation level.

    Raises
    ------
    CompileError
        Where g++ refuses the source.
    """

    def __init__(
        self, source: str, kernel: str, options: Sequence[str] = (), sanitizer: str = PLAIN, optimize: str = "-O2"
    ) -> None:
        if sanitizer not in (PLAIN, active()):
            raise RuntimeError(f"a kernel with the sanitizer {sanitizer} runs in a process that sanitized.run() starts")
        self.name = kernel
        self._launch = ctypes.CDLL(str(build_runtime(sanitizer))).cuda_on_cpu_launch
        self._library = ctypes.CDLL(str(build_kernel(source, kernel, options, sanitizer, optimize)))
        self._kernel = _Kernel.in_dll(self._library, "cuda_on_cpu_kernel")
        self.argument_sizes = tuple(self._kernel.argument_sizes[: self._kernel.argument_count])

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[bytes],
        *,
        shared_bytes: int = 0,
        cluster: int = 1,
        cooperative: bool = False,
        order: int = Order.ASCENDING,
        workers: int = 2,
    ) -> None:
        """Run the kernel to its end.

        Parameters
        ----------
        grid, block : sequence of int
            One to three extents, x first.
        arguments : sequence of bytes-like
            The bytes of each of the kernel's arguments; a pointer is the 8 bytes of its address.
        shared_bytes : int
            The size of the `extern __shared__` array.
        cluster : int
            The number of consecutive blocks (along x) of a cluster.
        cooperative : bool
            Whether all blocks are resident at once, so that grid_sync() works.
        order : int
            An `Order`, or what `shuffled` returns.
        workers : int
            The number of OS threads.

        Raises
        ------
        TypeError
            Where the arguments are not those of the kernel.
        LaunchError
            Where the launch is refused or fails.
        """
        buffers = [memoryview(argument).tobytes() for argument in arguments]
        sizes = tuple(map(len, buffers))
        if sizes != self.argument_sizes:
            raise TypeError(f"{self.name}: the kernel takes arguments of {self.argument_sizes} bytes; got {sizes}")
        request = _Request(
            grid=_extents(grid),
            block=_extents(block),
            cluster=cluster,
            cooperative=cooperative,
            workers=max(1, workers),
            dynamic_bytes=shared_bytes,
            order=order,
        )
        message = ctypes.create_string_buffer(2048)
        pointers = (ctypes.c_char_p * max(1, len(buffers)))(*buffers)
        if self._launch(
            ctypes.byref(self._kernel), ctypes.byref(request), pointers, message, ctypes.c_size_t(len(message))
        ):
            raise LaunchError(f"{self.name}<<<{tuple(grid)}, {tuple(block)}>>>: {message.value.decode()}")


def _extents(extents: Sequence[int]) -> tuple[int, ...]:
    return (*extents, 1, 1, 1)[:3]
