"""Diagnosis of real training runs: silent about healthy ones, and a planted fault is found where it is."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import cubn
from cubn.health.rules import RULES
from tests.health.runs.faults import FAULTS, NUMPY, PERCEPTRON
from tests.health.runs.judging import judged
from tests.health.runs.settings import draw
from tests.health.runs.training import train

HEALTHY = range(100)
"""Seeds that no threshold was set by."""

FEW = (11, 15, 20, 33, 34, 44)
"""Of these, some that take a fraction of a second."""


def findings(seeds):
    """(error, warning) of healthy runs, with and without Moments of their inputs."""
    found = []
    for seed in seeds:
        run = train(draw(seed))
        for moments in (None, run.moments):
            found += [(seed, finding) for finding in cubn.diagnose(run.subject, moments).findings]
    return [[entry for entry in found if entry[1].severity == severity] for severity in ("error", "warning")]


def test_nothing_is_wrong_with_a_few_healthy_runs():
    assert findings(FEW) == [[], []]


@pytest.mark.slow
def test_a_hundred_healthy_runs_give_no_error_and_at_most_two_warnings():
    errors, warnings = findings(HEALTHY)
    assert not errors and len(warnings) <= 2, (errors, warnings)


def cost(fault):
    """Perceptrons take a tenth of a second."""
    cheap = fault.settings.network in (NUMPY.network, PERCEPTRON.network)
    return pytest.param(fault, id=fault.name, marks=() if cheap else pytest.mark.full)


@pytest.mark.parametrize("fault", [cost(fault) for fault in FAULTS])
def test_a_planted_fault_is_found_with_layer_and_channel_and_nothing_else_is_blamed(fault):
    verdict = judged(fault, fault.run())
    assert (verdict.missed, verdict.blamed) == ([], [])


def test_every_rule_has_a_planted_fault():
    assert set(RULES) <= set().union(*(fault.rules for fault in FAULTS))


def test_runs_differ_in_all_that_is_drawn_and_repeat_themselves():
    settings = [draw(seed) for seed in HEALTHY]
    assert len({each.network for each in settings}) == 5
    assert {each.half for each in settings} == {each.affine for each in settings} == {True, False}
    assert min(each.batch for each in settings) == 8 and max(each.batch for each in settings) > 220
    assert {0.01, 0.5, None} < {each.momentum for each in settings}
    assert settings == [draw(seed) for seed in HEALTHY]
