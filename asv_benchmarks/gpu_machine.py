"""The GPU and the software that drives it, as a line of JSON; no host's name.

python asv_benchmarks/gpu_machine.py                  device, driver, versions
python asv_benchmarks/gpu_machine.py folder           the device as a folder's name
"""

import json
import platform
import re
import subprocess
import sys
from importlib import metadata

PACKAGES = (
    "numpy numba torch triton jax cupy-cuda13x cupy-cuda12x nvidia-cuda-nvrtc nvidia-cudnn-cu13 mpi4py ml_dtypes pytest"
)


def version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def query(field: str) -> str:
    """What nvidia-smi says of the first device."""
    try:
        run = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return run.stdout.strip()


def cuda_of_cupy() -> dict[str, object] | str:
    """Driver's, runtime's and compiler's CUDA, or why CuPy does not say."""
    try:
        import cupy

        return {
            "driver": cupy.cuda.runtime.driverGetVersion(),
            "runtime": cupy.cuda.runtime.runtimeGetVersion(),
            "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        }
    except Exception as error:  # the rest is worth having
        return f"{type(error).__name__}: {error}"


def found() -> dict[str, object]:
    """All of it."""
    return {
        "device": query("name"),
        "driver": query("driver_version"),
        "memory": query("memory.total"),
        "cuda": cuda_of_cupy(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES.split()},
    }


def folder() -> str:
    """As `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", query("name").lower()).strip("-")


if __name__ == "__main__":
    print(folder() if sys.argv[1:] == ["folder"] else json.dumps(found()))
