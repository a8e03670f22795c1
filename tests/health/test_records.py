"""Records stay within their memory, evenly spaced over the whole training, with the newest ones complete."""

import io
from functools import partial

import numpy as np
import pytest

import cubn
from cubn import health
from cubn.health.reading import Reading, Watched
from cubn.health.records import RECENT, History

Monitor = partial(health.Monitor, every=1)


def reading(i, channels):
    values = np.full((3, channels), i, np.float32) + np.arange(channels, dtype=np.float32) / 64
    return Reading(values, np.array([[i] * channels, [0] * channels]), np.full(channels, 0.1))


def recorded(steps, memory=4000, features=(3, 2)):
    layers = [Watched(f"bn{i}", size, 1e-5) for i, size in enumerate(features)]
    history = History(layers, np.dtype(np.float32), memory)
    for i in range(steps):
        history.append(i, reading(i, sum(features)))
    return history


@pytest.mark.parametrize("steps", [1, RECENT, 2 * RECENT + 1, 300, 5000])
def test_the_newest_records_are_all_there_and_the_others_evenly_spaced_from_the_first_on(steps):
    history = recorded(steps)
    kept = history.steps
    recent = min(steps, RECENT)
    assert kept[0] == 0 and kept[-recent:].tolist() == list(range(steps - recent, steps))
    earlier = kept[: kept.searchsorted(steps - 2 * RECENT)]
    assert (np.diff(earlier) == history.stride).all()
    assert len(kept) <= 4000 // 5 // (6 * 4 + 16) + 2 * RECENT


def test_memory_does_not_grow_and_is_what_was_asked_for():
    history = recorded(1)
    before = history.nbytes
    for i in range(1, 3000):
        history.append(i, reading(i, 5))
    assert history.nbytes == before
    recent = 2 * RECENT * (8 + 5 * (6 * 4 + 16))
    assert before - recent <= 4000 + 8 * 20


def test_each_record_has_the_values_of_its_step_and_of_its_layer():
    history = recorded(700)
    for name, channels in (("bn0", range(3)), ("bn1", range(3, 5))):
        layer = history[name]
        expected = layer.steps[:, None] + np.array(channels)[None] / 64
        for values in (layer.gamma, layer.running_mean, layer.running_var):
            assert (values == expected.astype(np.float32)).all()
        assert (layer.tracked == layer.steps[:, None]).all()
        assert (layer.last(4).steps == np.arange(696, 700)).all()


def test_float64_states_are_recorded_in_float64():
    state = cubn.BatchNormState(2, dtype="float64")
    monitor = Monitor(state)
    state.running_var[:] = 1e-300
    monitor.step()
    assert (monitor.history["state"].running_var == 1e-300).all()


def follow(monitor, state, steps, seed):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        cubn.forward_train(rng.standard_normal((4, 2, 3), dtype=np.float32), state)
        monitor.step()


def test_a_monitor_stored_and_restored_goes_on_as_if_nothing_had_been():
    through, stored = cubn.BatchNormState(2), cubn.BatchNormState(2)
    whole, first = health.Monitor(through, memory=3000), health.Monitor(stored, memory=3000)
    for monitor, state in ((whole, through), (first, stored)):
        follow(monitor, state, 301, seed=0)
    file = io.BytesIO()
    np.savez(file, **first.to_dict())
    file.seek(0)
    second = health.Monitor.from_dict(np.load(file), stored)
    for monitor, state in ((whole, through), (second, stored)):
        follow(monitor, state, 300, seed=1)
    assert repr(second) == repr(whole) and second.history.stride == whole.history.stride > 1
    for name in ("steps", "running_var", "batch_mean", "tracked"):
        ours, theirs = getattr(second.history["state"], name), getattr(whole.history["state"], name)
        assert np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f")


def test_what_was_told_is_not_told_again_after_a_checkpoint():
    state, told = cubn.BatchNormState(2), []
    first = Monitor(state, check=1, on_finding=told.append)
    first.step()
    state.running_mean[1] = np.nan
    first.step()
    second = health.Monitor.from_dict(first.to_dict(), state, on_finding=told.append)
    second.step()
    assert [found.rule for found in told] == ["became-non-finite"]
    assert repr(second.findings) == repr(first.findings)  # of a NaN


def test_the_records_of_other_layers_are_refused():
    stored = Monitor({"a": cubn.BatchNormState(2), "block": cubn.BatchNormState(3)}).to_dict()
    with pytest.raises(ValueError, match=r"from_dict: subject must have the layers that .* others: block, head\."):
        health.Monitor.from_dict(stored, {name: cubn.BatchNormState(2) for name in ("a", "block", "head")})
