"""Every rule finds what is planted, with its layer and channels, and nothing in layers that are healthy."""

from dataclasses import replace

import numpy as np
import pytest

import cubn
from cubn.health.diagnose import examine
from cubn.health.layer import Layer
from cubn.health.rules import RULES, Found, rule
from tests.health.healthy import findings_of, healthy, with_data

SIZES = [4, 16, 257]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("C", [1, 2, *SIZES])
def test_nothing_is_found_in_a_healthy_layer(C, seed):
    assert findings_of(with_data(healthy(C, seed))) == []


def test_nothing_is_found_where_little_is_known():
    whole = healthy()
    assert findings_of(Layer("a", 3), Layer("b", 0, running_mean=np.zeros(0), running_var=np.zeros(0))) == []
    assert findings_of(Layer("a", 16, running_mean=whole.running_mean, running_var=whole.running_var)) == []
    assert findings_of(Layer("a", 16, gamma=whole.gamma, beta=whole.beta)) == []


NAN, INF = float("nan"), float("inf")
EVERY = tuple(range(16))
FRESH = {
    "gamma": np.ones(16),
    "beta": np.zeros(16),
    "running_mean": np.zeros(16),
    "running_var": np.ones(16),
    "tracked": np.zeros(16, np.int64),
}
NARROW = healthy().running_var.astype(np.float16).astype(np.float64)

PLANTED = {
    "NaN in a mean": ({"running_mean": {3: NAN}}, "non-finite", "error", (3,)),
    "inf in a variance": ({"running_var": {0: INF, 15: INF}}, "non-finite", "error", (0, 15)),
    "NaN in gamma": ({"gamma": {2: NAN}}, "non-finite", "error", (2,)),
    "-inf in beta": ({"beta": {2: -INF}}, "non-finite", "error", (2,)),
    "a negative variance": ({"running_var": {3: -1e-9}}, "negative-variance", "error", (3,)),
    "a subnormal variance": ({"running_var": {3: 5.6e-45}}, "subnormal-variance", "warning", (3,)),
    "a dead channel": ({"running_var": {7: 1e-9}}, "dead", "info", (7,)),
    "a variance of 0": ({"running_var": {7: 0.0}}, "dead", "info", (7,)),
    "a dying layer": ({"running_var": dict.fromkeys(range(9), 1e-9)}, "dead", "warning", tuple(range(9))),
    "a collapsing channel": ({"running_var": {5: 5e-6}}, "collapsing", "info", (5,)),
    "a large gamma": ({"gamma": {4: 100.0}}, "gain", "warning", (4,)),
    "an exploded gamma": ({"gamma": {4: -1e4}}, "gain", "error", (4,)),
    "all skipped": ({"skipped": {1: 300}}, "skipped", "error", (1,)),
    "some skipped": ({"skipped": {1: 50, 2: 26}}, "skipped", "warning", (1, 2)),
    "one skipped": ({"skipped": {1: 1}}, "skipped", "info", (1,)),
    "a count that was lost": ({"tracked": np.zeros(16, np.int64)}, "counts", "warning", EVERY),
    "counts that differ": ({"tracked": {8: 400}}, "counts", "info", (8,)),
    "channels that never moved": ({"running_mean": {6: 0.0}, "running_var": {6: 1.0}}, "never-updated", "error", (6,)),
    "a trained layer that never moved": ({**FRESH, "beta": healthy().beta}, "never-updated", "error", EVERY),
    "a new layer": (FRESH, "never-updated", "info", EVERY),
    "float16": ({"dtypes": {"running_mean": "float16", "running_var": "float16"}}, "16-bit", "warning", ()),
    "bfloat16": ({"dtypes": {"running_mean": "bfloat16", "running_var": "bfloat16"}}, "16-bit", "warning", ()),
    "rounded": ({"running_mean": -NARROW, "running_var": NARROW}, "16-bit", "warning", ()),
    "eps of 0": ({"eps": 0.0, "running_var": {2: 0.0}}, "eps", "error", (2,)),
    "a negative eps": ({"eps": -1e-5}, "eps", "error", ()),
    "a huge eps": ({"eps": 1.0}, "eps", "warning", ()),
    "a tiny eps": ({"eps": 1e-30}, "eps", "warning", ()),
    "an eps above the variances": ({"eps": 0.05, "running_var": healthy().running_var / 100}, "eps", "warning", ()),
    "Keras' momentum": ({"momentum": 0.99}, "momentum", "warning", ()),
    "a momentum of 1": ({"momentum": 1.0}, "momentum", "warning", ()),
    "a momentum of 0": ({"momentum": 0.0}, "momentum", "warning", ()),
    "a momentum that is no weight": ({"momentum": 1.5}, "momentum", "error", ()),
    "a momentum of NaN": ({"momentum": NAN}, "momentum", "error", ()),
    "a momentum of next to nothing": ({"momentum": 1e-6}, "momentum", "info", ()),
}


@pytest.mark.parametrize("case", PLANTED)
def test_what_is_planted_is_found(case):
    changes, name, severity, channels = PLANTED[case]
    report = examine([healthy(seed=1), replace(healthy(**changes), name="spoiled")])
    if case == "a new layer":
        report = examine([replace(healthy(**changes), name="spoiled")])
    (found,) = report.findings
    assert (found.rule, found.severity, found.layer, found.channels) == (name, severity, "spoiled", channels)
    assert found.message and found.evidence and found.cause and (found.remedy or severity == "info")
    for value in found.evidence.values():
        assert isinstance(value, (int, float, str)) or len(value) == len(channels)


@pytest.mark.parametrize("C", SIZES)
@pytest.mark.parametrize("what", ["running_mean", "running_var", "gamma", "beta"])
def test_the_channel_is_named_at_every_size_and_place(what, C):
    for channel in (0, C // 2, C - 1):
        assert findings_of(healthy(C, **{what: {channel: NAN}})) == [("non-finite", "error", (channel,))]


# --- what is harmless, and what is not ------------------------------------------------------------------------------


def test_a_constant_channel_that_varies_in_the_data_is_an_error():
    layer = healthy(running_var={7: 1e-40, 8: 1e-10})
    data = with_data(healthy()).moments
    found = findings_of(replace(layer, moments=data))
    assert ("subnormal-variance", "error", (7,)) in found
    assert ("dead", "error", (8,)) in found
    assert ("stale", "error", (7, 8)) in found


def test_a_constant_channel_that_is_constant_in_the_data_is_not():
    layer = healthy(running_var={7: 1e-40, 8: 1e-10})
    assert {severity for _, severity, _ in findings_of(with_data(layer))} == {"info"}


def test_a_subnormal_variance_is_a_warning_but_in_the_first_of_several_layers():
    layer, other = healthy(running_var={7: 5.6e-45}), replace(healthy(seed=1), name="other")
    assert findings_of(layer) == [("subnormal-variance", "warning", (7,))], (
        "of one layer nobody knows what is before it"
    )
    assert findings_of(other, layer) == [("subnormal-variance", "warning", (7,))]
    (found,) = examine([layer, other]).findings
    assert found.severity == "info" and "harmless while its inputs stay constant" in found.message


def test_moments_excuse_the_subnormal_variances_of_constant_channels_and_no_others():
    layer = with_data(healthy(running_var={7: 5.6e-45, 9: 5.6e-45}))
    x = np.random.default_rng(0).standard_normal((500, 16)) * np.sqrt(layer.running_var) + layer.running_mean
    x[:, 9] += np.random.default_rng(1).normal(0, 5e-4, 500)  # a variance of eps / 40
    found = [entry for entry in findings_of(replace(layer, moments=cubn.moments(x))) if entry[0] != "stale"]
    assert found == [("subnormal-variance", "warning", (9,)), ("subnormal-variance", "info", (7,))]


def test_pixels_that_are_seldom_not_0_are_not_stale():
    x = np.random.default_rng(0).standard_normal((1400, 16)) * np.sqrt(healthy().running_var) + healthy().running_mean
    x[:, 5] = 0
    x[:2, 5] = 0.5
    layer = healthy(running_mean={5: 1e-9}, running_var={5: 1e-12})
    found = findings_of(_with(layer, x))
    assert found == [("dead", "info", (5,))]
    x[:700, 5] = 0.5
    assert ("stale", "error", (5,)) in findings_of(_with(layer, x))


def test_rounding_that_a_tiny_eps_amplifies_is_a_warning():
    layer = healthy(eps=1e-12, running_mean={3: 10.0, 4: 1e-9}, running_var={3: 0.0, 4: 0.0})
    assert ("dead", "warning", (3,)) in findings_of(layer)
    assert findings_of(replace(layer, eps=1e-5)) == [("dead", "info", (3, 4))]


def test_a_small_variance_alone_makes_a_large_gain_worth_knowing_only():
    layer = healthy(running_var={3: 1e-4})
    assert findings_of(layer) == [("gain", "info", (3,))]


def test_a_dead_channel_hides_no_exploded_gamma():
    layer = replace(healthy(4), gamma=np.array([1, 3000.0, 1, 1]), running_var=np.array([1.0, 1.0, 5.6e-45, 1.0]))
    assert ("gain", "error", (1,)) in findings_of(layer)


def test_gains_that_are_spread_may_be_far():
    gamma = np.exp(np.random.default_rng(0).normal(0, 2.5, 16))
    assert gamma.max() / np.median(gamma) > 30
    assert findings_of(healthy(gamma=gamma)) == []


def test_a_residual_block_that_begins_with_gamma_0_is_healthy():
    assert findings_of(healthy(gamma=np.zeros(16))) == []
    assert findings_of(healthy(gamma=dict.fromkeys(range(12), 0.0))) == []


@pytest.mark.parametrize("C", [1, 2])
def test_the_only_channel_of_a_layer_is_not_most_of_it(C):
    found = findings_of(healthy(C, running_var=dict.fromkeys(range(C), 0.0)))
    assert found == [("dead", "info" if C == 1 else "warning", tuple(range(C)))]


# --- updates --------------------------------------------------------------------------------------------------------


def test_a_layer_that_never_moved_beside_others_that_did_is_an_error():
    new = replace(healthy(**FRESH), name="new")
    assert findings_of(new, replace(new, name="other")) == [("never-updated", "info", EVERY)] * 2
    assert findings_of(new, healthy()) == [("never-updated", "error", EVERY)]


def test_why_a_layer_never_moved_is_said():
    def cause(**changes):
        (found,) = [f for f in examine([healthy(**(FRESH | changes))]).findings if f.rule == "never-updated"]
        return found.cause

    counted = np.full(16, 9, np.int64)
    assert "momentum of 0" in cause(momentum=0.0, tracked=counted)
    assert "every update was skipped" in cause(tracked=counted, skipped=counted)
    assert "eval mode" in cause(tracked=counted)


def test_skipped_updates_that_become_more_are_a_warning():
    few = healthy(skipped={1: 10})
    assert findings_of(few) == [("skipped", "info", (1,))]
    lately = np.where(np.arange(16) == 1, 0.2, 0.0)
    (found,) = examine([replace(few, skipped_lately=lately)]).findings
    assert found.severity == "warning" and "lately more" in found.message and found.evidence["share lately"] == [0.2]


def test_a_cumulative_average_without_its_count_is_an_error():
    lost = np.zeros(16, np.int64)
    assert findings_of(healthy(tracked=lost, momentum="cumulative")) == [("counts", "error", EVERY)]
    missing = replace(healthy(momentum="cumulative", tracked=None, skipped=None), name="missing")
    assert findings_of(healthy(), missing) == [("counts", "error", ())]
    assert findings_of(missing) == [], "nobody counts: a format without counters"


def test_layers_that_count_less_than_half_the_updates_of_others_are_worth_knowing():
    late = replace(healthy(tracked=np.full(16, 100, np.int64)), name="late")
    assert findings_of(healthy(), late) == [("counts", "info", ())]


# --- 16 bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("C", [2, 64])
def test_rounded_statistics_are_found_and_one_that_is_not_acquits(kind, C):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.float16 if kind == "float16" else ml_dtypes.bfloat16
    whole = healthy(C)
    mean, var = (a.astype(np.float32).astype(dtype).astype(float) for a in (whole.running_mean, whole.running_var))
    layer = replace(whole, running_mean=mean, running_var=var)
    (found,) = examine([layer]).findings
    assert found.rule == "16-bit" and kind in found.message
    mean = mean.copy()
    mean[-1] = np.float32(1.0001)
    assert findings_of(replace(layer, running_mean=mean)) == []


def test_round_numbers_are_not_taken_for_rounded_ones():
    layer = healthy(running_mean=np.arange(16.0), running_var=np.arange(1, 17) / 8)
    assert findings_of(layer) == []


def test_how_far_from_its_goal_a_statistic_stalls_is_said():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    (found,) = examine([healthy(momentum=0.01, dtypes={"running_var": "bfloat16"})]).findings
    assert found.evidence["stands still up to"] == "39 % from its goal"
    for goal in range(120, 250):
        value = np.float32(100)
        for _ in range(1000):
            value = np.float32(ml_dtypes.bfloat16(value + 0.01 * (goal - value)))
        assert 0.1 < (goal - value) / value < 0.4


# --- the table of rules ---------------------------------------------------------------------------------------------


def test_every_rule_has_a_case_and_says_what_it_is():
    assert {name for _, name, _, _ in PLANTED.values()} | {"stale", "ranks"} == set(RULES)
    for function in RULES.values():
        assert function.__doc__ and function.__doc__.split("\n")[0].endswith((".", ":"))


def test_a_rule_of_ones_own_is_one_function():
    @rule("large-mean")
    def large_mean(layer, network):
        """A running mean is large."""
        wrong = np.abs(layer.running_mean) > 50
        if wrong.any():
            yield Found("warning", "running_mean is large", wrong, {"running_mean": layer.running_mean[wrong]})

    try:
        (found,) = examine([healthy(running_mean={2: 60.0})]).findings
    finally:
        del RULES["large-mean"]
    assert (found.rule, found.layer, found.channels) == ("large-mean", "block.bn", (2,))
    assert found.evidence == {"running_mean": [60.0]}


def _with(layer, x):
    """The layer beside Moments that do not show how heavy tails are, as they are no range of samples."""
    return replace(layer, moments=cubn.moments(x[:1]) + cubn.moments(x[1:]))
