"""How long the campaign runs, and with which seed; see tests/conftest.py for the options."""

import pytest

from tests.fuzz import harness

SHARES = {"valid_calls": 0.36, "bad_input": 0.18, "capsules": 0.1, "signals": 0.1, "modes": 0.1, "cuda": 0.06}
"""Of the time, for each part; the rest is for other targets."""


@pytest.fixture
def seed(request):
    return request.config.getoption("fuzz_seed")


@pytest.fixture
def campaign(request, seed):
    """campaign(part): run cases of a part for its share of the time."""

    def run(part, *, share=None, **options):
        seconds = request.config.getoption("fuzz_seconds") * (share or SHARES[part])
        print(harness.campaign(part, seed, seconds, **options))

    return run
