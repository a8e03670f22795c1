"""A monitor reads what there is, tells what it finds once, waits for nothing, and leaves nothing behind."""

import logging
import warnings
from functools import partial

import numpy as np
import pytest

import cubn
from cubn import health
from cubn.health import HealthWarning, monitor

Monitor = partial(health.Monitor, every=1)


def batch(rng, features=4):
    return rng.standard_normal((8, features, 6), dtype=np.float32)


def train(subject, states, steps, change=lambda step, x: None, **options):
    """A monitor that watched a training."""
    rng = np.random.default_rng(0)
    watching = Monitor(subject, **options)
    for step in range(steps):
        for state in states:
            x = batch(rng, state.num_features)
            change(step, x)
            cubn.forward_train(x, state)
        watching.step()
    return watching


def planted(state, **options):
    """A monitor that has just found a NaN in channel 1."""
    watching = Monitor(state, check=1, **options)
    state.running_mean[1] = np.nan
    return watching


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda a, b: [a, b], lambda a, b: {"0": a, "1": b}, lambda a, b: (a, b)])
def test_several_states_are_recorded_by_their_names(make):
    states = cubn.BatchNormState(4), cubn.BatchNormState(2, affine=False, running_variance="biased")
    history = train(make(*states), states, 3).history
    assert list(history) == ["0", "1"]
    for name, state in zip(history, states, strict=True):
        assert (history[name].running_mean[-1] == state.running_mean).all()
        assert (history[name].running_var[-1] == state.running_var).all()
        assert (history[name].tracked[-1] == 3).all()
    assert (history["1"].gamma == 1).all()


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
def test_arrays_of_other_libraries_are_read(library):
    state = cubn.BatchNormState(3, like=pytest.importorskip(library).ones(3))
    watching = Monitor(state)
    watching.step()
    assert watching.history["state"].running_var.tolist() == [[1, 1, 1]]


def test_a_healthy_training_is_told_nothing_of():
    states = [cubn.BatchNormState(4), cubn.BatchNormState(3, momentum=None)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(states, states, 120).findings == []


def test_what_has_no_running_statistics_is_refused():
    with pytest.raises(TypeError, match=r"Monitor: subject must be a BatchNormState, .* got an int\."):
        Monitor(3)
    with pytest.raises(ValueError, match=r"Monitor: subject must have running statistics; got none\."):
        Monitor([cubn.BatchNormState(2, track=False)])


@pytest.mark.parametrize("options", [{"every": 0}, {"check": -1}, {"memory": 0}])
def test_options_that_are_not_positive_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"Monitor: {name} must be at least 1; got"):
        health.Monitor(cubn.BatchNormState(2), **options)
    with pytest.raises(TypeError, match=r"Monitor: on_finding must be 'warn', 'log' or a function; got 'mail'\."):
        Monitor(cubn.BatchNormState(2), on_finding="mail")


# --- what is told -----------------------------------------------------------------------------------------------------


def test_a_warning_is_given_once_and_points_at_who_calls_step():
    watching = planted(cubn.BatchNormState(3))
    with pytest.warns(HealthWarning, match=r"step 0, state, channel 1: running_mean is not finite .*Try: ") as caught:
        watching.step()
    assert caught[0].filename == __file__
    watching.step()  # another would be an error
    assert [noticed.step for noticed in watching.findings] == [0]


def test_each_layer_is_told_of():
    states, told = [cubn.BatchNormState(2), cubn.BatchNormState(2)], []
    watching = Monitor(states, check=1, on_finding=told.append)
    for state in states:
        state.running_var[0] = np.inf
        watching.step()
    assert [found.layer for found in told] == ["0", "1"]


def test_a_line_is_logged_at_the_level_of_the_finding(caplog):
    with caplog.at_level(logging.WARNING, "cubn.health"):
        planted(cubn.BatchNormState(3), on_finding="log").step()
    ((name, level, text),) = caplog.record_tuples
    assert (name, level) == ("cubn.health", logging.ERROR) and "[became-non-finite]" in text


def test_what_is_raised_on_a_finding_loses_no_record():
    watching = planted(cubn.BatchNormState(3))
    with pytest.raises(HealthWarning):  # warnings are errors
        watching.step()
    watching.step()
    assert watching.history.records == 2 and len(watching.findings) == 1


def test_a_warning_that_becomes_an_error_is_told_again(monkeypatch):
    severities, told = iter(["warning", "warning", "error", "warning", "error"]), []

    def rule(history):
        return [cubn.health.Finding("planted", next(severities), "state", "found")]

    monkeypatch.setattr(monitor, "trends", rule)
    watching = Monitor(cubn.BatchNormState(2), check=1, on_finding=told.append)
    for _ in range(5):
        watching.step()
    assert [found.severity for found in told] == ["warning", "error"]


def test_infos_are_kept_and_not_told():
    state, told = cubn.BatchNormState(2), []
    watching = Monitor(state, check=1, on_finding=told.append)
    watching.step()
    state.tracked, state.skipped = 1000, 1  # one overflow in a thousand batches
    watching.step()
    assert [noticed.finding.severity for noticed in watching.findings] == ["info"] and told == []


def test_a_report_has_what_is_wrong_now_and_how_it_came():
    state = cubn.BatchNormState(4)
    train(state, [state], 1)
    watching = planted(state, on_finding=lambda found: None)
    watching.step()
    assert {"non-finite", "became-non-finite"} <= {found.rule for found in watching.report().findings}


# --- what is not waited for, and what is left -------------------------------------------------------------------------


class Slow:
    """A device's reading, which arrives when it is told to."""

    arrived, waited = False, 0

    def __init__(self, done):
        self.done = done

    def ready(self):
        return Slow.arrived

    def result(self):
        Slow.waited += not Slow.arrived
        return self.done.result()


def test_a_step_waits_for_no_device(monkeypatch):
    state = cubn.BatchNormState(2)
    watching = Monitor(state)
    read = watching._source.read
    monkeypatch.setattr(watching._source, "read", lambda: Slow(read()))
    monkeypatch.setattr(Slow, "arrived", False)
    for _ in range(monitor.UNDER_WAY):
        watching.step()
    assert Slow.waited == 0 and watching.history.records == 0
    monkeypatch.setattr(Slow, "arrived", True)
    watching.step()
    assert watching.history.steps.tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(Slow, "arrived", False)
    watching.step()
    watching.close()  # waits
    assert watching.history.records == 6 and Slow.waited == 1


def test_many_readings_under_way_are_bounded(monkeypatch):
    watching = Monitor(cubn.BatchNormState(2))
    read = watching._source.read
    monkeypatch.setattr(watching._source, "read", lambda: Slow(read()))
    for _ in range(50):
        watching.step()
        assert len(watching._under_way) <= monitor.UNDER_WAY


class Optimizer:
    """What torch's have of hooks."""

    def __init__(self):
        self.hooks = []

    def register_step_post_hook(self, hook):
        self.hooks.append(hook)
        return self

    def remove(self):
        self.hooks.clear()


def test_an_optimizer_calls_step_until_the_block_ends():
    optimizer = Optimizer()
    with Monitor(cubn.BatchNormState(2)).attach(optimizer) as watching:
        optimizer.hooks[0](optimizer, (), {})
        assert watching.history.records == 1
    assert optimizer.hooks == []
    with pytest.raises(TypeError, match=r"attach: optimizer must have register_step_post_hook, .* got an int\."):
        watching.attach(3)


def test_an_exception_in_the_block_removes_the_hook_and_is_not_hidden():
    optimizer, state = Optimizer(), cubn.BatchNormState(2)
    with pytest.raises(KeyError), Monitor(state).attach(optimizer) as watching:  # noqa: PT012
        state.running_mean[0] = np.nan  # of which a warning, an error here, would be made
        watching.step()
        raise KeyError
    assert optimizer.hooks == []


def test_the_end_of_the_block_looks_at_the_last_records():
    state, told = cubn.BatchNormState(2), []
    with Monitor(state, check=100, on_finding=told.append) as watching:
        state.running_mean[0] = np.nan
        watching.step()
    assert [found.rule for found in told] == ["became-non-finite"]


# --- rules ------------------------------------------------------------------------------------------------------------


def found_by(rule, watching):
    return [noticed for noticed in watching.findings if noticed.finding.rule == rule]


def test_a_variance_that_sinks_is_found_with_its_channel_and_how_fast_it_halves():
    state = cubn.BatchNormState(4)

    def die(step, x):
        x[:, 2] *= step < 20

    (noticed,) = found_by("variance-sinking", train(state, [state], 160, die, on_finding=lambda found: None))
    assert noticed.finding.channels == (2,) and noticed.finding.severity == "warning"
    assert noticed.finding.evidence["steps to halve"] == pytest.approx([np.log(0.5) / np.log(0.9)], rel=0.01)
    assert state.running_var[2] < 1e-6 and noticed.step < 150


def test_a_small_variance_that_keeps_still_is_not_sinking():
    state = cubn.BatchNormState(4)

    def small(step, x):
        x[:, 2] *= 1e-3

    assert not found_by("variance-sinking", train(state, [state], 160, small, on_finding=lambda found: None))


def test_pixels_that_are_seldom_not_constant_are_worth_knowing_in_the_first_of_several_layers_only():
    def border(step, x):
        x[:, 2] *= step < 30

    for count, severity in ((2, "info"), (1, "warning")):
        states, told = [cubn.BatchNormState(4, momentum=0.2) for _ in range(count)], []
        found = train(states, states[:1], 100, border, on_finding=told.append).findings
        assert {noticed.finding.rule for noticed in found} == {"variance-sinking", "gain-growing"}
        assert {(noticed.finding.severity, noticed.finding.channels) for noticed in found} == {(severity, (2,))}
        assert bool(told) == (severity == "warning")


def test_a_channel_that_was_always_constant_has_no_growing_gain():
    state = cubn.BatchNormState(4, momentum=0.2)

    def constant(step, x):
        x[:, 2] = 0

    assert train(state, [state], 100, constant, on_finding=lambda found: None).findings == []


def test_a_report_knows_that_lately_more_was_skipped():
    state = cubn.BatchNormState(4)

    def overflow(step, x):
        if step >= 290:
            x[0, 3] = np.nan

    watching = train(state, [state], 300, overflow, on_finding=lambda found: None)
    (found,) = [found for found in watching.report().findings if found.rule == "skipped"]
    assert found.severity == "warning" and "lately more" in found.message and found.channels == (3,)


def test_memory_is_bounded_whatever_the_number_of_steps_and_channels():
    state = cubn.BatchNormState(1000)
    watching = Monitor(state, memory=100_000, on_finding=lambda found: None)
    before = watching.history.nbytes
    for _ in range(200):
        watching.step()
    assert watching.history.nbytes == before < 100_000 + 65 * 1000 * 48


def test_what_is_far_behind_is_told_before_a_window_is_over():
    state = cubn.BatchNormState(8, momentum=0.02)

    def jump(step, x):
        x *= 1 if step < 60 else 6

    noticed, *_ = found_by("running-behind", train(state, [state], 70, jump, check=1, on_finding=lambda found: None))
    assert noticed.step == 61 and noticed.finding.severity == "warning" and noticed.finding.evidence["size"] > 3


def test_a_gain_that_grows_is_found_and_one_that_was_large_is_not():
    state = cubn.BatchNormState(6)
    state.gamma[1] = 50

    def grow(step, x):
        state.gamma[4] = 1.05**step

    watching = train(state, [state], 160, grow, on_finding=lambda found: None)
    (noticed,) = found_by("gain-growing", watching)
    assert noticed.finding.channels == (4,)
    assert 10 <= noticed.finding.evidence["times"][0] <= 20


def test_skipped_batches_are_found_with_channel_and_number():
    state = cubn.BatchNormState(4)

    def overflow(step, x):
        if step % 2:
            x[0, 3] = np.nan

    watching = train(state, [state], 80, overflow, on_finding=lambda found: None)
    assert {noticed.finding.channels for noticed in found_by("updates-skipped", watching)} == {(3,)}
    assert found_by("updates-skipped", watching)[-1].finding.severity == "error"


def test_statistics_that_are_behind_are_found_and_those_that_kept_up_are_not():
    state, told = cubn.BatchNormState(4), []

    def drift(step, x):
        x *= 1.0 if step < 60 else 1.15 ** (step - 60)

    watching = train(state, [state], 100, drift, on_finding=told.append)
    noticed, *_ = found_by("running-behind", watching)
    assert 60 < noticed.step <= 80 and len(noticed.finding.channels) >= 3
    assert noticed.finding.evidence["size"] >= 1.6
    assert not found_by("running-behind", train(state, [state], 60, on_finding=lambda found: None))


def test_a_single_channel_that_is_far_behind_is_found():
    state = cubn.BatchNormState(64, momentum=0.02)

    def jump(step, x):
        x[:, 5] += 0 if step < 60 else 20

    watching = train(state, [state], 80, jump, on_finding=lambda found: None)
    assert found_by("running-behind", watching)[0].finding.channels == (5,)


def test_what_became_infinite_is_dated():
    state, told = cubn.BatchNormState(3), []
    watching = Monitor(state, check=7, on_finding=told.append)
    for step in range(7):
        if step == 4:
            state.gamma[2] = np.inf
        watching.step()
    (found,) = told
    assert found.evidence["step"] == 4 and found.channels == (2,) and found.severity == "error"
