"""Ranks for the tests: threads under plain pytest, processes under mpiexec."""

import os

import pytest

from cubn.sync import threads
from tests.mpi.launch import UNDER_MPI, libraries


def _outcome(body, comm):
    try:
        return body(comm), None
    except Exception as error:
        return None, error


def of_threads(size, body):
    return threads.run(size, lambda comm: _outcome(body, comm))


def of_processes(size, body):
    """The first `size` processes run the body; all of them know all outcomes."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if size > world.size:
        pytest.skip(f"needs {size} processes")
    part = world.Split(0 if world.rank < size else MPI.UNDEFINED)
    outcome = None
    if part != MPI.COMM_NULL:
        outcome = _outcome(body, part)
        part.Free()
    return world.allgather(outcome)[:size]


@pytest.fixture
def outcomes():
    """outcomes(size, body): (what body(comm) returned, what it raised) of each rank, in rank order."""
    return of_processes if os.environ.get(UNDER_MPI) else of_threads


@pytest.fixture
def ranks(outcomes):
    """ranks(size, body): what body(comm) returned on each rank, in rank order."""

    def run(size, body):
        pairs = outcomes(size, body)
        errors = [error for _, error in pairs if error is not None]
        if errors:
            raise ExceptionGroup("ranks failed", errors)
        return [result for result, _ in pairs]

    return run


@pytest.fixture(params=["openmpi", "mpich"])
def mpi(request):
    """An MPI to start processes with."""
    if request.param not in libraries():
        pytest.skip(f"no {request.param} here, or no mpi4py")
    return libraries()[request.param]
