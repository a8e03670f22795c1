"""Modules in several processes: DDP, FSDP, process groups and MPI. What they check is in `ranks.py`."""

import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")

from tests.mpi.launch import ROOT, libraries

WARNINGS = ["-W", "error::UserWarning", "-W", "ignore:cubn.torch"]


def wait_for(ranks):
    """Until all are done or one has failed, for which the others would wait."""
    end = time.monotonic() + 200
    while None in (states := [rank.poll() for rank in ranks]) and not any(states) and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets through a file here")
def test_1_2_and_4_ranks_of_a_process_group(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUBN_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *WARNINGS, "-m", "tests.torch.ranks", "gloo", str(tmp_path / "meeting"), "4", str(rank)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        wait_for(ranks)
    finally:
        for rank in ranks:
            rank.kill()
    outcomes = [rank.communicate() for rank in ranks]
    assert [out for out, _ in outcomes] == ["done\n"] * 4, "\n".join(err for _, err in outcomes)


def test_2_and_3_ranks_under_mpi(tmp_path):
    if not libraries():
        pytest.skip("no MPI here, or no mpi4py")
    mpi = next(iter(libraries().values()))
    run = mpi.run(3, *WARNINGS, "-m", "mpi4py", "-m", "tests.torch.ranks", "mpi", str(tmp_path / "meeting"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("done\n") == 3, run.stdout
