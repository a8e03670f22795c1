"""Nothing that should be refused is taken, crashes or hangs; and the campaign would see it if a check were gone."""

import pytest

from tests.fuzz import harness
from tests.fuzz.unchecked import CHECKS
from tests.ops.pairwise import others_full


def test_bad_input_is_refused_and_changes_nothing(campaign):
    campaign("bad_input")


@pytest.mark.slow
def test_a_hundred_thousand_bad_inputs_are_refused(seed):
    print(harness.campaign("bad_input", seed, cases=100_000))


def without(check, seed, gone=True):
    """A campaign of the cases a check is there for."""
    environment = {"CUBN_UNCHECKED": check, "CUBN_GONE": "yes" if gone else "no"}
    return harness.campaign("unchecked", seed, cases=1500 if gone else 300, environment=environment)


@pytest.mark.parametrize("check", others_full([(check,) for check in CHECKS], [0]))
def test_a_check_that_is_gone_is_found(check, seed):
    with pytest.raises(harness.Failed, match=r"^unchecked: case \d+ of seed"):
        without(check, seed)


def test_the_same_cases_pass_where_the_check_is_there(seed):
    assert without("shape", seed, gone=False).startswith("unchecked: 300 cases")
