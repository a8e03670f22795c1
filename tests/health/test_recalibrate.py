"""States recalibrated: one answer for every cut over batches and ranks, all layers or none."""

import signal
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubn
from cubn.health.recalibration import commit as recalibration_commit
from cubn.sync import threads
from tests.health.recalibrating import assert_same_statistics, data, rank_by_rank, state_of


def statistics(state):
    return state.running_mean.copy(), state.running_var.copy(), state.tracked.copy(), state.skipped.copy()


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=8),
    positions=st.sampled_from([(), (1,), (3, 5), (2100,)]),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_batches_cut_anywhere_give_the_bits_of_the_whole(cuts, positions, dtype):
    x = data(40, positions, dtype)
    state = state_of(x)
    pooled = cubn.recalibrate(state, (x[lo:hi] for lo, hi in pairwise([0, *sorted(cuts), 40])))
    assert_same_statistics(state, pooled, x)
    assert (state.tracked == len(cuts) + 1).all() and not state.skipped.any()


@pytest.mark.parametrize("ranks", range(1, 17))
def test_contiguous_ranges_in_rank_order_give_the_bits_of_the_whole(ranks):
    """A random cut; 200 for each number of ranks with -m slow."""
    rank_by_rank(ranks, ranks, threads.run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", range(1, 17))
def test_200_cuts_over_each_number_of_ranks(ranks):
    for seed in range(200):
        rank_by_rank(ranks, seed, threads.run)


@pytest.mark.parametrize("ranks", [2, 5])
def test_parts_without_order_are_pooled_up_to_rounding_and_the_same_on_all_ranks(ranks):
    x = data(64, (5,), "float64")
    whole = cubn.moments(x)

    def body(comm):
        state = state_of(x)
        part = x[comm.rank :: ranks]  # round robin
        pooled = cubn.recalibrate(state, [part[:3], part[3:]], comm=comm)
        return state, pooled

    results = threads.run(ranks, body)
    for state, pooled in results:
        assert (pooled.mean == results[0][1].mean).all() and (pooled.m2 == results[0][1].m2).all()
        assert pooled.count == whole.count and not pooled.exact
        np.testing.assert_allclose(pooled.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(pooled.m2, whole.m2, rtol=1e-12)
        assert (state.tracked == 2 * ranks).all()


def test_the_statistics_are_those_of_the_whole_set_in_float64():
    """A merge takes four roundings for its mean, six for its m2, and each value passes depth merges; R is the largest
    |x|. So the mean is off by e = 4 depth u R at most, and the variance by 6 depth u var + 2 e R + e**2.
    """
    x = data(777, (3,), "float64")
    values = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(np.longdouble)
    mean, var = values.mean(1), values.var(1)
    state = state_of(x)
    cubn.recalibrate(state, np.array_split(x, 50))
    depth, u, R = 10 + 2 + 1, 2.0**-53, np.abs(values).max(1)  # of samples, of positions, and the tile's pivot
    e = 4 * depth * u * R
    n = values.shape[1]
    assert (np.abs(state.running_mean - mean) <= e + u * np.abs(mean)).all()
    bound = (6 * depth + 4) * u * var + 2 * e * R + e**2
    assert (np.abs(state.running_var - var * n / (n - 1)) <= bound * n / (n - 1)).all()


def test_each_of_several_states_gets_its_own_statistics():
    a, b = data(20, (3,), "float32"), data(20, (), "float64", channels=2)
    states = [cubn.BatchNormState(4, running_variance="biased"), cubn.BatchNormState(2, dtype="float64")]
    pooled = cubn.recalibrate(states, [[a[:7], b[:7]], [a[7:], b[7:]]])
    assert [one.num_features for one in pooled] == [4, 2]
    assert (states[0].running_var == cubn.moments(a).var().astype(np.float32)).all()
    assert (states[1].running_var == cubn.moments(b).var_unbiased()).all()
    named = {"a": cubn.BatchNormState(4), "b": cubn.BatchNormState(2, dtype="float64")}
    pooled = cubn.recalibrate(named, [{"b": b, "a": a}])
    assert pooled.keys() == {"a", "b"} and (named["b"].running_mean == states[1].running_mean).all()


def test_channels_may_be_last_and_arrays_of_any_library():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(data(10, (3,), "float32").swapaxes(1, -1))
    state = cubn.BatchNormState(4, channel_axis=-1, like=x)
    cubn.recalibrate(state, [x[:9], x[9:]])
    assert isinstance(state.running_mean, jax.Array)
    assert (np.asarray(state.running_mean) == cubn.moments(x, channel_axis=-1).mean.astype(np.float32)).all()


def test_the_next_batch_of_a_cumulative_average_weighs_as_one_more():
    x = data(40, (), "float64")
    state = cubn.BatchNormState(4, momentum=None, dtype="float64")
    cubn.update(state, cubn.moments(1000 + x))
    cubn.recalibrate(state, np.array_split(x, 3))
    before = state.running_mean.copy()
    cubn.update(state, cubn.moments(x[:5]))
    np.testing.assert_allclose(state.running_mean, 0.75 * before + 0.25 * cubn.moments(x[:5]).mean, rtol=1e-14)


def interrupted_after(batches, x, error):
    yield from np.array_split(x, 8)[:batches]
    raise error


@pytest.mark.parametrize("error", [RuntimeError("read"), KeyboardInterrupt()])
def test_an_interrupt_leaves_the_old_statistics_and_what_was_pooled_in_the_file(error, tmp_path):
    x, path = data(40, (3,), "float32"), tmp_path / "pooled"
    state = state_of(x)
    cubn.update(state, cubn.moments(x[:5] * 3))
    before = statistics(state)
    with pytest.raises(type(error)):
        cubn.recalibrate(state, interrupted_after(5, x, error), checkpoint=path)
    assert all((a == b).all() for a, b in zip(before, statistics(state), strict=True))
    seen = []

    def again():
        for i, batch in enumerate(np.array_split(x, 8)):
            seen.append(i)
            yield batch if i >= 5 else None  # which would be an error if it were pooled again

    pooled = cubn.recalibrate(state, again(), checkpoint=path)
    assert_same_statistics(state, pooled, x)
    assert (state.tracked == 8).all() and seen == [*range(8)] and not path.exists()


def test_an_error_in_the_midst_of_the_change_puts_all_back(monkeypatch):
    jax = pytest.importorskip("jax")
    x = data(10, (), "float32")
    states = [state_of(x), cubn.BatchNormState(4, like=jax.numpy.asarray(x)), state_of(x)]
    states[0].running_mean[1] = np.nan
    before = [[np.asarray(one) for one in (s.running_mean.copy(), s.running_var.copy(), s.tracked)] for s in states]
    memory = states[0].running_mean
    replace = recalibration_commit._replace

    def failing(state, pooled):
        if state is states[2]:
            raise MemoryError
        replace(state, pooled)

    monkeypatch.setattr(recalibration_commit, "_replace", failing)
    with pytest.raises(MemoryError):
        cubn.recalibrate(states, [[x] * 3])
    for state, old in zip(states, before, strict=True):
        for now, then in zip((state.running_mean, state.running_var, state.tracked), old, strict=True):
            np.testing.assert_array_equal(np.asarray(now), then)
    assert states[0].running_mean is memory


def test_ctrl_c_in_the_midst_of_the_change_comes_after_all_of_it(monkeypatch):
    x = data(10, (), "float32")
    states = [state_of(x), state_of(x)]
    replace = recalibration_commit._replace

    def interrupted(state, pooled):
        signal.raise_signal(signal.SIGINT)
        replace(state, pooled)

    monkeypatch.setattr(recalibration_commit, "_replace", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            cubn.recalibrate(states, [[x, x]])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    for state in states:
        assert (state.running_mean == cubn.moments(x).mean.astype(np.float32)).all() and (state.tracked == 1).all()


X = data(10, (), "float32")
WITH_NAN = X.copy()
WITH_NAN[3, 2] = np.nan


def of_16_bits():
    zeros = np.zeros(4, np.float16)
    return cubn.BatchNormState.from_arrays(running_mean=zeros, running_var=zeros.copy())


REFUSED = {
    "no batches": (lambda: (state_of(X), []), {}, ValueError, "batches must hold a batch; got none"),
    "one value": (lambda: (state_of(X), [X[:1]]), {}, ValueError, "batches must hold at least two values"),
    "a NaN": (lambda: (state_of(X), [WITH_NAN]), {}, ValueError, r"finite .*; got others in channels \[2\]"),
    "too large": (lambda: (state_of(X), [X * np.float64(1e30)]), {}, ValueError, "finite statistics in every channel"),
    "other channels": (lambda: (state_of(X), [X[:, :3]]), {}, ValueError, "a batch must have 4 channels"),
    "channels of batches": (lambda: (state_of(X), [X, X[:, :3]]), {}, ValueError, "4 channels"),
    "no state": (lambda: (3, [X]), {}, TypeError, "states_or_model must be a BatchNormState.*; got an int"),
    "no states": (lambda: ([], [X]), {}, ValueError, "states_or_model must hold a state"),
    "numbers": (lambda: ({1: state_of(X)}, [{1: X}]), {}, TypeError, r"have names that are str; got \[1\]"),
    "twice": (lambda: ([state := state_of(X), state], [[X, X]]), {}, ValueError, "hold each state once"),
    "untracked": (lambda: (cubn.BatchNormState(4, track=False), [X]), {}, ValueError, "have running statistics"),
    "16 bits": (lambda: (of_16_bits(), [X]), {}, TypeError, "running_mean must have dtype float32 or float64"),
    "batches": (lambda: (state_of(X), 3), {}, TypeError, "batches must be iterable; got an int"),
    "too few arrays": (lambda: ([state_of(X)] * 1, [[X, X]]), {}, ValueError, "a batch must be a list of 1 arrays"),
    "other names": (lambda: ({"a": state_of(X)}, [{"b": X}]), {}, ValueError, "a batch must be a mapping of the"),
    "layerwise": (lambda: (state_of(X), [X]), {"layerwise": True}, TypeError, "layerwise must be left out"),
    "forward": (lambda: (state_of(X), [X]), {"forward": print}, TypeError, "forward must be left out for states"),
    "start": (lambda: (state_of(X), [X]), {"start": -1}, ValueError, "start must be 0 or more"),
    "every": (lambda: (state_of(X), [X]), {"checkpoint_every": 0}, ValueError, "checkpoint_every must be 1 or more"),
    "progress": (lambda: (state_of(X), [X]), {"progress": "no"}, TypeError, "progress must be True or False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(name):
    make, options, kind, text = REFUSED[name]
    subject, batches = make()
    states = [subject] if isinstance(subject, cubn.BatchNormState) else []
    before = [(state.running_mean, np.copy(state.running_mean)) for state in states if state.tracked is not None]
    with pytest.raises(kind, match=f"^recalibrate: .*{text}"):
        cubn.recalibrate(subject, batches, **options)
    assert all((now == then).all() for now, then in before)


def test_a_bar_goes_over_all_batches(capsys):
    cubn.recalibrate(state_of(X), [X[:5], X[5:]], progress=True)
    assert "recalibrating: 100%" in capsys.readouterr().err
    cubn.recalibrate(state_of(X), [X[:5], X[5:]])
    assert not capsys.readouterr().err  # which is no terminal


def test_a_bar_without_tqdm_is_refused_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    cubn.recalibrate(state_of(X), [X])
    with pytest.raises(ImportError, match=r"^recalibrate: progress=True needs tqdm .*: pip install tqdm$"):
        cubn.recalibrate(state_of(X), [X], progress=True)
