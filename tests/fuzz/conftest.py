"""How long the campaign runs, and with which seed; see tests/conftest.py for the options."""

import pytest

from tests.fuzz import harness

SHARES = {"valid_calls": 0.4, "bad_input": 0.2, "capsules": 0.12, "signals": 0.12, "modes": 0.1, "cuda": 0.06}
"""Of the time, for each part."""


@pytest.fixture
def seed(request):
    return request.config.getoption("fuzz_seed")


@pytest.fixture
def campaign(request, seed):
    """campaign(part): run cases of a part for its share of the time."""

    def run(part, **options):
        said = harness.campaign(part, seed, SHARES[part] * request.config.getoption("fuzz_seconds"), **options)
        print(said)

    return run
