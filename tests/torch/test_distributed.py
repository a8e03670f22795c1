"""Modules in several processes: DDP, FSDP, process groups and MPI. What they check is in `ranks.py`."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from tests.mpi.launch import ROOT, libraries

PROGRAM = ["-W", "error::UserWarning", "-m", "tests.torch.ranks"]


@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets through a file here")
def test_1_2_and_4_ranks_of_a_process_group(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUBN_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *PROGRAM, "gloo", str(tmp_path / "meeting"), "4", str(rank)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        outcomes = [(*rank.communicate(timeout=200), rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for out, err, status in outcomes:
        assert (out, status) == ("done\n", 0), err


def test_2_and_3_ranks_under_mpi(tmp_path):
    if not libraries():
        pytest.skip("no MPI here, or no mpi4py")
    mpi = next(iter(libraries().values()))
    run = mpi.run(3, "-W", "error::UserWarning", "-m", "mpi4py", *PROGRAM[2:], "mpi", str(tmp_path / "meeting"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("done\n") == 3
