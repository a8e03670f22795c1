"""Whether device pointers may be given to MPI: only where every source says yes."""

from cubn.cli import info

SOURCES = {
    "openmpi": ("MPIX_Query_cuda_support", "opal_cuda_support", "opal_built_with_cuda_support"),
    "mpich": ("MPIX_Query_cuda_support", "MPIX_GPU_query_support", "MPIR_CVAR_ENABLE_GPU", "mpi_memory_alloc_kinds"),
}

VERDICTS = """
from cubn.sync.cuda_aware import verdict
assert verdict({}) == (False, "there is nothing to ask")
assert verdict({"a": True, "b": True}) == (True, "a says yes, b says yes")
assert verdict({"a": True, "b": False}) == (False, "a says yes, b says no")
"""


def test_the_wheels_say_no_in_every_way_they_can(mpi):
    run = mpi.run(1, "-m", "cubn.sync.cuda_aware")
    library, aware = run.stdout.splitlines()
    assert {"openmpi": "Open MPI", "mpich": "MPICH"}[mpi.name] in library
    assert aware == "no: " + ", ".join(f"{source} says no" for source in SOURCES[mpi.name])


def test_one_no_is_enough(mpi):
    run = mpi.run(1, "-c", VERDICTS)
    assert run.returncode == 0, run.stderr


def test_info_shows_the_evidence(mpi, monkeypatch):
    monkeypatch.setenv("MPI4PY_LIBMPI", mpi.libmpi)
    text = info.info()
    assert "  CUDA-aware  no: MPIX_Query_cuda_support says no" in text


def test_info_survives_an_mpi_that_does_not_start(mpi, monkeypatch, tmp_path):
    monkeypatch.setenv("MPI4PY_LIBMPI", str(tmp_path / "no-such-library"))
    last = info.info().splitlines()[-1]
    assert last.startswith("  library  cannot be started: ") and "no-such-library" in last
