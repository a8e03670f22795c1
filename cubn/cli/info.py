"""What is installed, which backends work here and why the others do not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata

from cubn._types import CPU, CUDA
from cubn.backends import backend_for
from cubn.errors import BackendUnavailable

LIBRARIES = {  # name -> the distributions that may provide it; read from their metadata, never imported
    "numpy": ("numpy",),
    "numba": ("numba",),
    "llvmlite": ("llvmlite",),
    "torch": ("torch",),
    "jax": ("jax",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "mpi4py": ("mpi4py",),
    "nccl": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
}


def version_of(*distributions: str) -> str:
    """The version of the first of these distributions that is installed, or "not installed"."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def availability(device_type: int) -> tuple[bool, str]:
    """Whether the backend of a DLPack device type works here, and if not, why."""
    try:
        backend_for((device_type, 0))
    except (BackendUnavailable, ImportError) as error:
        return False, f"not available: {error}"
    return True, "available"


def _cpu_settings() -> dict[str, str]:
    from cubn import get_num_threads
    from cubn.backends.cpu import cache, pool

    try:
        chosen = pool.choose()
        whose = "a team of an OpenMP runtime's" if chosen.teams_of else "a pool of cubn's own"
        threads = f"{get_num_threads()}, in {whose}: {chosen.reason}"
    except ValueError as error:
        threads = str(error)
    return {
        "threads": threads,
        "kernel cache": cache.state(),
    }


def _cuda_settings() -> dict[str, str]:
    from cubn.backends.cuda.cupy_device import settings

    return settings()


def _mpi() -> dict[str, str]:
    """What mpi4py runs on, asked in a process of its own: starting MPI takes a second, and may end a process."""
    command = [sys.executable, "-m", "cubn.sync.cuda_aware"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired as error:
        return {"library": f"cannot be started: {error}"}
    if run.returncode:
        said = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        return {"library": f"cannot be started: {said[-1]}"}
    library, aware = run.stdout.splitlines()[-2:]
    return {"library": library, "CUDA-aware": aware}


def _section(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return ["", title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())]


def info() -> str:
    """The text of `python -m cubn info`."""
    import cubn

    lines = [
        f"cubn {cubn.__version__}, numerics contract {cubn.NUMERICS}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        *_section("libraries", {name: version_of(*distributions) for name, distributions in LIBRARIES.items()}),
    ]
    cpu_works, cpu = availability(CPU)
    cuda_works, cuda = availability(CUDA)
    lines += _section("backends", {"cpu": cpu, "cuda": cuda})
    if cpu_works:
        lines += _section("cpu backend", _cpu_settings())
    if cuda_works:
        lines += _section("cuda backend", _cuda_settings())
    if version_of("mpi4py") != "not installed":
        lines += _section("mpi", _mpi())
    return "\n".join(lines)
