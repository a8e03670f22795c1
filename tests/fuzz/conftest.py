"""How long the campaign runs, and with which seed; see tests/conftest.py for the options."""

import pytest

import cubn
from tests.fuzz import harness

SHARES = {"valid_calls": 0.34, "bad_input": 0.12, "capsules": 0.06, "signals": 0.12, "modes": 0.1, "cuda": 0.08}
"""Of the time, for each part; the rest is for other targets, each of which compiles kernels of its own."""


@pytest.fixture
def seed(request):
    return request.config.getoption("fuzz_seed")


@pytest.fixture(autouse=True)
def number_of_threads():
    """Cases that are run in the tests' own process set it."""
    before = cubn.get_num_threads()
    yield
    cubn.set_num_threads(before)


@pytest.fixture
def campaign(request, seed):
    """campaign(part): run cases of a part for its share of the time."""

    def run(part, *, share=None, **options):
        seconds = request.config.getoption("fuzz_seconds") * (share or SHARES[part])
        print(harness.campaign(part, seed, seconds, **options))

    return run
