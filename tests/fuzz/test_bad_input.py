"""Nothing that should be refused is taken, crashes or hangs; and the campaign would see it if a check were gone."""

import importlib
import warnings
from types import SimpleNamespace

import pytest

from cubn import _layout
from tests.fuzz import bad_input, harness


def test_bad_input(campaign):
    campaign("bad_input")


@pytest.mark.slow
def test_a_hundred_thousand(seed):
    print(harness.campaign("bad_input", seed, cases=100_000))


def _of(*targets, role=None):
    """Cases of these targets, bad in this role."""

    def draw(rng):
        while True:
            case = bad_input.draw(rng)
            if case.target in targets and role in (None, case.bad[0][0]):
                return case

    return SimpleNamespace(__name__="bad input", draw=draw, run=bad_input.run)


CHECKS = {
    "eps": ("cubn.forward", "checked_eps", lambda eps, function: float(eps), _of("normalize", role="eps")),
    "shape": ("cubn._arguments", "_check_like", lambda *arguments: None, _of("forward", role="residual")),
    "mask": (
        "cubn._layout",
        "mask_operand",
        lambda mask, shape, axis: _layout.operand(mask, 0) if len(mask.shape) > 1 else None,
        _of("moments", role="mask"),
    ),
    "writable": ("cubn._arrays", "check_writable", lambda *arguments: None, _of("forward", role="out")),
    "statistics": ("cubn._holding", "check_together", lambda described: None, _of("state", role="running_mean")),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_is_gone_is_found(check, monkeypatch, seed):
    where, name, nothing, cases = CHECKS[check]
    monkeypatch.setattr(importlib.import_module(where), name, nothing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert harness.first_failure(cases, seed, 300) is not None
