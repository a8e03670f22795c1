"""Nothing that should be refused is taken, crashes or hangs; and the campaign would see it if a check were gone."""

import warnings
from types import SimpleNamespace

import pytest

from cubn import _arguments, _arrays, _layout, state
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
    "eps": (state, "checked_eps", lambda eps, function: float(eps), _of("normalize", role="eps")),
    "shape": (_arguments, "_check_like", lambda *arguments: None, _of("forward", role="residual")),
    "mask": (
        _layout,
        "mask_operand",
        lambda mask, shape, axis: _layout.operand(mask, 0) if len(mask.shape) > 1 else None,
        _of("moments", role="mask"),
    ),
    "writable": (_arrays, "check_writable", lambda *arguments: None, _of("forward", role="out")),
    "state": (state, "_check_statistics", lambda described: None, _of("from_arrays", role="running_mean")),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_is_gone_is_found(check, monkeypatch, seed):
    where, name, nothing, cases = CHECKS[check]
    monkeypatch.setattr(where, name, nothing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert harness.first_failure(cases, seed, 300) is not None
