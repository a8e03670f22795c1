"""The train/eval gap is what it says it is, names the layer at fault, and leaves a model as it was."""

import json

import numpy as np
import pytest

import cubn
from cubn.health import train_eval_gap


def rms(values):
    return np.sqrt(np.mean(np.square(values, dtype=np.float64)))


def a_state(seed, features=3, **options):
    rng = np.random.default_rng(seed)
    state = cubn.BatchNormState(features, **options)
    for name in ("gamma", "beta", "running_mean"):
        if getattr(state, name) is not None:
            getattr(state, name)[:] = rng.standard_normal(features)
    state.running_var[:] = rng.random(features) + 0.1
    return state


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"channel_axis": -1}])
def test_the_local_gap_is_that_of_outputs_computed_by_both_statistics(options):
    state = a_state(0, **options)
    batches = [
        np.random.default_rng(i).normal(1, 2, (size, 3, 5, 3)).astype(np.float32) for i, size in enumerate((8, 3))
    ]
    (layer,) = train_eval_gap(state, batches).layers
    axis = state.channel_axis
    by_batch = [
        cubn.normalize(x, cubn.moments(x, channel_axis=axis), gamma=state.gamma, beta=state.beta, channel_axis=axis)
        for x in batches
    ]
    change = np.concatenate([cubn.forward(x, state) - y for x, y in zip(batches, by_batch, strict=True)])
    size = rms(np.concatenate(by_batch))
    assert layer.local == pytest.approx(rms(change) / size, rel=1e-5)
    by_channel = [rms(each) / size for each in np.moveaxis(change, axis, 0)]
    assert layer.channels == pytest.approx(by_channel, rel=1e-5)
    assert layer.worst == tuple(np.argsort(by_channel)[::-1])


def test_states_that_are_the_batch_s_have_no_gap_and_those_that_are_not_come_first():
    x = np.random.default_rng(0).standard_normal((6, 3, 50), dtype=np.float32)
    states = {name: cubn.BatchNormState(3, momentum=1, running_variance="biased") for name in "abc"}
    for state in states.values():
        cubn.forward_train(x, state)
    states["b"].running_mean[2] += 3
    states["c"].running_var[1] = np.nan
    found = train_eval_gap(states, [dict.fromkeys(states, x)])
    assert [layer.name for layer in found.layers] == ["c", "b", "a"]
    assert found.layers[0].local == np.inf and found.layers[0].worst[0] == 1
    assert found.layers[1].worst[0] == 2 and found.layers[2].local < 1e-6
    assert found.measure is None and json.loads(found.to_json())["layers"][0]["local"] == "inf"


def test_inputs_that_do_not_fit_the_states_are_refused():
    states = [cubn.BatchNormState(2), cubn.BatchNormState(2)]
    x = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"train_eval_gap: batches must have an input for each state, 0, 1; got 0\."):
        train_eval_gap(states, [[x]])
    with pytest.raises(ValueError, match=r"train_eval_gap: batches must hold at least one batch; got none\."):
        train_eval_gap(states, [])
    with pytest.raises(TypeError, match=r"train_eval_gap: subject must be a BatchNormState"):
        train_eval_gap({"a": 1}, [{"a": x}])
    with pytest.raises(TypeError, match=r"train_eval_gap: loss must be None for plain states"):
        train_eval_gap(states[0], [x], loss=max)
