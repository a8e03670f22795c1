"""States merged: statistics of the data of all of them, and refusals where it is not known how much each weighs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cubn
from tests.health.recalibrating import data


def client(x, running_variance="unbiased", **options):
    state = cubn.BatchNormState(4, momentum=1.0, dtype="float64", running_variance=running_variance, **options)
    cubn.update(state, cubn.moments(x))
    return state


PARTS = [data(30, (), "float64"), 5 + data(9, (), "float64", seed=1), data(50, (), "float64", seed=2) / 3]
COUNTS = [len(part) for part in PARTS]
WHOLE = np.concatenate(PARTS)


@given(
    cuts=st.lists(st.integers(2, 87), min_size=1, max_size=4, unique=True).filter(
        lambda cuts: all(b - a > 1 for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 89], strict=True))
    ),
    kinds=st.lists(st.sampled_from(["unbiased", "biased"]), min_size=5, max_size=5),
)
def test_the_statistics_are_those_of_all_data_together(cuts, kinds):
    """Whichever variance each of them has."""
    parts = np.split(WHOLE, sorted(cuts))
    states = [client(part, kind) for part, kind in zip(parts, kinds, strict=False)]
    merged = cubn.merge_states(states, counts=[len(part) for part in parts])
    np.testing.assert_allclose(merged.running_mean, WHOLE.mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged.running_var, WHOLE.var(0, ddof=kinds[0] == "unbiased"), rtol=1e-13)
    assert (merged.tracked == len(parts)).all()


def test_without_counts_states_that_saw_as_many_updates_weigh_the_same():
    states = [client(part) for part in PARTS]
    means, variances = ([getattr(state, name) for state in states] for name in ("running_mean", "running_var"))
    merged = cubn.merge_states(states)
    np.testing.assert_allclose(merged.running_mean, np.mean(means, 0), rtol=1e-14)
    np.testing.assert_allclose(merged.running_var, np.mean(variances, 0) + np.var(means, 0), rtol=1e-13)


@pytest.mark.parametrize(("tracked", "said"), [([1, 2, 1], "1; 2; 1"), ([0, 0, 0], "0; 0; 0")])
def test_without_counts_states_of_unknown_weight_are_refused(tracked, said):
    states = [client(part) for part in PARTS]
    for state, updates in zip(states, tracked, strict=True):
        state.tracked = updates
    with pytest.raises(ValueError, match=f"^merge_states: counts must be given .*; got tracked {said}.* Give counts="):
        cubn.merge_states(states)
    merged = cubn.merge_states(states, counts="equal")
    for state in states:
        state.tracked = 1
    assert (merged.running_var == cubn.merge_states(states).running_var).all()


def test_gamma_and_beta_are_averaged_with_the_same_weights_or_the_first_ones():
    states = [client(part) for part in PARTS]
    for i, state in enumerate(states):
        state.gamma[:], state.beta[:] = i, 10 * i
    merged = cubn.merge_states(states, counts=COUNTS)
    expected = np.average([0, 1, 2], weights=COUNTS)
    np.testing.assert_allclose(merged.gamma, expected, rtol=1e-15)
    np.testing.assert_allclose(merged.beta, 10 * expected, rtol=1e-15)
    first = cubn.merge_states(states, counts=COUNTS, parameters="first")
    assert (first.gamma == 0).all() and (first.running_var == merged.running_var).all()


def test_what_is_excluded_is_not_in_the_result():
    models = [{name: client(part) for name in ("a", "b", "c")} for part in PARTS]
    merged = cubn.merge_states(models, counts=COUNTS, exclude={"a": "statistics", "b": "parameters", "c": "both"})
    assert merged.keys() == {"a", "b"}
    assert merged["a"].running_mean is merged["a"].tracked is None and merged["a"].gamma is not None
    assert merged["b"].gamma is merged["b"].beta is None and merged["b"].running_mean is not None
    assert cubn.merge_states(models, counts=COUNTS, exclude=["a", "c"]).keys() == {"b"}


def test_one_without_data_counts_for_nothing():
    states = [*(client(part) for part in PARTS), cubn.BatchNormState(4, momentum=1.0, dtype="float64")]
    states[-1].running_mean[:], states[-1].tracked = np.nan, 5
    expected = cubn.merge_states(states[:-1], counts=COUNTS)
    merged = cubn.merge_states(states, counts=[*COUNTS, 0])
    assert (merged.running_var == expected.running_var).all() and (merged.tracked == expected.tracked).all()


def test_nothing_that_was_given_is_changed():
    states = [client(part) for part in PARTS]
    before = [state.to_dict() for state in states]
    merged = cubn.merge_states(states, counts=COUNTS)
    merged.gamma[:] = merged.running_mean[:] = 7
    for state, then in zip(states, before, strict=True):
        assert all(np.array_equal(now, then[name]) for name, now in state.to_dict().items())


def named(i, **changes):
    return {"bn": client(PARTS[i], **changes)}


def broken():
    state = client(PARTS[0])
    state.running_var[1] = np.inf
    return state


REFUSED = {
    "nothing": (lambda: [], {}, TypeError, "states must be a sequence of states, mappings or modules"),
    "one state": (lambda: client(PARTS[0]), {}, TypeError, "states must be a sequence"),
    "something else": (lambda: [3], {}, TypeError, "states must be BatchNormStates"),
    "other layers": (lambda: [named(0), {"other": client(PARTS[1])}], {}, ValueError, "have the same layers; got oth"),
    "other eps": (lambda: [named(0), named(1, eps=1e-3)], {}, ValueError, "states of bn must .* got others in eps"),
    "other arrays": (lambda: [named(0), named(1, affine=False)], {}, ValueError, "got others in beta, gamma"),
    "not finite": (lambda: [client(PARTS[1]), broken()], {}, ValueError, "finite running statistics .* others at 1"),
    "too few counts": (lambda: [named(0), named(1)], {"counts": [3]}, ValueError, "counts must be 2 numbers"),
    "negative": (lambda: [named(0), named(1)], {"counts": [3, -1]}, ValueError, "counts must be 2 numbers"),
    "no data": (lambda: [named(0), named(1)], {"counts": [0, 0]}, ValueError, "not all 0"),
    "fractions": (lambda: [named(0), named(1)], {"counts": [0.5, 0.5]}, TypeError, "counts must be 2 numbers"),
    "weights": (lambda: [named(0), named(1)], {"counts": [1, 1]}, ValueError, "counts must be 0, or 2 or .*'equal'"),
    "a single value": (
        lambda: [named(0), named(1, running_variance="biased")],
        {"counts": [0, 1]},
        ValueError,
        "counts must be 2 or more in all",
    ),
    "another word": (
        lambda: [named(0), named(1)],
        {"counts": "same"},
        ValueError,
        "counts must be 'equal'; got 'same'",
    ),
    "unknown layer": (lambda: [named(0)], {"exclude": ["nb"]}, ValueError, "exclude must name layers, 'bn'"),
    "a word": (lambda: [named(0)], {"exclude": "bn"}, TypeError, "exclude must be several names.*Use .'bn'."),
    "an unknown part": (lambda: [named(0)], {"exclude": {"bn": "all"}}, ValueError, "exclude must be 'statistics' or"),
    "everything": (lambda: [named(0)], {"exclude": ["bn"]}, ValueError, "exclude must leave something"),
    "parameters": (lambda: [named(0)], {"parameters": "last"}, ValueError, "parameters must be 'average' or 'first'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    make, options, kind, text = REFUSED[name]
    with pytest.raises(kind, match=f"^merge_states: .*{text}"):
        cubn.merge_states(make(), **options)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def models(torch):
    import cubn.torch

    made = []
    for part in PARTS[:2]:
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3), cubn.torch.SyncBatchNorm(3))
        with torch.no_grad():
            model[2].weight += len(made)
        model(torch.tensor(part, dtype=torch.float32))
        made.append(model)
    return made


def test_modules_and_state_dicts_are_merged_alike(torch):
    made = models(torch)
    states = cubn.merge_states(made, counts=COUNTS[:2])
    merged = cubn.merge_states([model.state_dict() for model in made], counts=COUNTS[:2])
    assert states.keys() == {"0", "2"} and isinstance(states["0"].running_mean, np.ndarray)
    for path, state in states.items():
        for name, theirs in (("gamma", "weight"), ("running_mean",) * 2, ("running_var",) * 2):
            assert (merged[f"{path}.{theirs}"].numpy() == getattr(state, name)).all()
    made[0].load_state_dict(merged, strict=False)
    assert (made[0][2].running_var.numpy() == states["2"].running_var).all()
    assert made[0][0].num_batches_tracked == 2 and not [key for key in merged if key.startswith("1.")]


def test_what_is_excluded_is_not_in_the_state_dict(torch):
    merged = cubn.merge_states([model.state_dict() for model in models(torch)], exclude={"0": "statistics"})
    assert [key for key in merged if key.startswith("0.")] == ["0.weight", "0.bias"]


def test_the_result_is_made_by_the_library_asked_for(torch):
    merged = cubn.merge_states([client(part) for part in PARTS], like=torch.zeros(1))
    assert isinstance(merged.gamma, torch.Tensor) and merged.running_var.dtype == torch.float64
