"""Machine code into the current device, by CuPy: `cuda` is its module cupy.cuda."""

from __future__ import annotations

from typing import Any

from cubn.backends.cuda import clusters
from cubn.backends.cuda.machine_code import MachineCode
from cubn.errors import BackendUnavailable

DEFAULT_SHARED_BYTES = 48 << 10

UNFIT = (
    "CUDA_ERROR_INVALID_IMAGE",
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_INVALID_PTX",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
)
"""What drivers say of code that they do not know."""


def function(cuda: Any, code: MachineCode, cubin: bytes, name: str, shared_bytes: int) -> Any:
    """A kernel of what `code` has compiled, a cupy.cuda.function.Function; its blocks may use so much shared memory.

    Raises
    ------
    BackendUnavailable
        If the driver does not know what the compiler made.
    """
    module = cuda.function.Module()
    try:
        module.load(cubin)
    except cuda.driver.CUDADriverError as error:
        if not str(error).startswith(UNFIT):
            raise
        raise BackendUnavailable(
            f"cubn: the CUDA driver does not know what {code.compiler} makes for sm_{code.compiler.architecture} "
            f"({error}). Update NVIDIA's driver, or install the CuPy and the compiler of an older CUDA version, with: "
            "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12"
        ) from error
    found = module.get_function(name)
    if shared_bytes > DEFAULT_SHARED_BYTES:  # a block has more only if its kernel was told
        driver = cuda.driver
        of_its_own = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, found.ptr)
        most = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.funcSetAttribute(found.ptr, most, shared_bytes - of_its_own)
    return found


def largest_cluster(cuda: Any, code: MachineCode, shared_bytes: int) -> int:
    """Blocks of the largest cluster that the current device holds; see `clusters`."""
    probe = function(cuda, code, code.compiled("probe", clusters.PROBE), "probe", shared_bytes)
    return clusters.largest(probe.ptr, shared_bytes)
