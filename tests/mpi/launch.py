"""The MPI libraries at hand, and programs started under them.

An MPI is looked for beside this Python, on the PATH, and in the environments that CUBN_TESTS_MPI lists: the wheels of
two MPIs do not fit in one, so `python -m venv mpich && mpich/bin/pip install mpich` makes another.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

UNDER_MPI = "CUBN_TESTS_UNDER_MPI"
"""Set in the processes started here."""

ROOT = Path(__file__).parents[2]


class Library(NamedTuple):
    """An MPI: its launcher, and the shared library that mpi4py is told to load."""

    name: str
    mpiexec: str
    libmpi: str

    def run(self, processes, *command, timeout=200):
        """Run python with this command line in so many processes; what came of it. A hang is an error."""
        options = ["--oversubscribe", "--allow-run-as-root"] if self.name == "openmpi" else []
        environment = {
            **os.environ,
            UNDER_MPI: "1",
            "MPI4PY_LIBMPI": self.libmpi,
            "PYTHONPATH": str(ROOT),
            "CUBN_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [self.mpiexec, *options, "-n", str(processes), sys.executable, *command],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@cache
def libraries():
    """Every MPI at hand, by name; none if there is no mpi4py."""
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return {}
    listed = os.environ.get("CUBN_TESTS_MPI", "").split(os.pathsep)
    on_path = shutil.which("mpiexec")
    prefixes = [Path(sys.prefix), *(Path(folder) for folder in listed if folder)]
    prefixes += [Path(on_path).resolve().parents[1]] if on_path else []
    found = {}
    for prefix in prefixes:
        mpiexec = prefix / "bin" / "mpiexec"
        shared = sorted(prefix.glob("lib/libmpi.so.*"))
        if mpiexec.exists() and shared:
            version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
            name = "openmpi" if "Open" in version else "mpich"
            found.setdefault(name, Library(name, str(mpiexec), str(shared[0])))
    return found
