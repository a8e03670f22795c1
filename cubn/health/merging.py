"""Running statistics of several models pooled into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, Literal, get_args

import numpy as np

from cubn._arguments import as_int, one_of
from cubn._floating_point import default_floating_point
from cubn._moments import Moments
from cubn._state.arrays import STATISTICS
from cubn._state.counted import COUNTERS
from cubn.errors import a_type, message, reporting_as
from cubn.health.merging_subjects import Layers, layers_of, result_like
from cubn.state import BatchNormState
from cubn.typing import SupportsDLPack

Parameters = Literal["average", "first"]
Excluded = Literal["statistics", "parameters", "both"]
Equal = Literal["equal"]

PARAMETERS = ("gamma", "beta")
_ENTRIES = {"statistics": (*STATISTICS, *COUNTERS), "parameters": PARAMETERS}
_SAME = ("num_features", "eps", "channel_axis")
"""Options on which states must agree; of the others the first one's are taken."""


@default_floating_point
@reporting_as("merge_states")
def merge_states(
    states: Sequence[Any],
    *,
    counts: Sequence[int] | Equal | None = None,
    parameters: Parameters = "average",
    exclude: Iterable[str] | Mapping[str, Excluded] = (),
    like: SupportsDLPack | None = None,
) -> Any:
    """One state whose running statistics are those of the data of several states taken together.

    mean = sum(w_i * mean_i) and var = sum(w_i * var_i) + sum(w_i * (mean_i - mean)**2) with w_i = count_i / sum(count):
    within the states, and between them (the law of total variance). An average of variances leaves out the second
    term, and is too small wherever the means differ.

    Parameters
    ----------
    states : sequence
        Of BatchNormState; of mappings of names to them; of torch modules, whose batch norms are merged; or of the
        state_dicts of such modules. All of one kind, with the same layers.
    counts : sequence of int or "equal", optional
        How many values per channel each one's running statistics are of; samples do, where all have as many positions.
        0 leaves one out. "equal": all weigh the same. None: the same, and an error unless their counters agree.
    parameters : {"average", "first"}
        What becomes of gamma and beta: the average with the same weights, or the first state's.
    exclude : names of layers, or mapping of names to {"statistics", "parameters", "both"}
        What is not in the result, so that who takes it keeps their own (FedBN keeps "both", SiloBN "statistics"). Names
        alone mean both. A single state's name is "".
    like : array, optional
        The result's arrays are made by this array's library, on its device; by NumPy without it.

    Returns
    -------
    BatchNormState, or dict of str to BatchNormState
        A state for states, a dict for mappings and modules (by the path of each batch norm), with the options of the
        first; `tracked` and `skipped` are the sums. For state_dicts a dict of tensors, of batch norms alone, for
        `load_state_dict(strict=False)`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; if states differ in layers, channels, eps or arrays; if running statistics are not
        finite; if counts are needed and not given.

    Notes
    -----
    In float64, rounded once to the dtype of the first state's arrays. What is unbiased is m2 / (count - 1) of each
    state and of the result: so counts are numbers of values, not weights in any unit, and 1 is refused. Without numbers
    they are taken for large, and no such factor is used. The order of the states decides the last bits.

    References
    ----------
    McMahan et al. 2017 (federated averaging); Li et al. 2021 (FedBN); Andreux et al. 2020 (SiloBN).

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.random.default_rng(0).normal(0, [[1.0], [5.0]], (2, 100)).reshape(200, 1)
    >>> clients = [cubn.BatchNormState(1, momentum=1.0, dtype="float64") for _ in range(2)]
    >>> for client, part in zip(clients, (x[:150], x[150:])):
    ...     cubn.update(client, cubn.moments(part))
    >>> merged = cubn.merge_states(clients, counts=[150, 50])
    >>> bool(np.isclose(merged.running_var, x.var(ddof=1), rtol=1e-14)[0])
    True
    """
    models = _checked_models(states)
    one_of(get_args(Parameters), parameters, "parameters")
    left_out = _checked_exclusions(exclude, models[0])
    weights = None if counts is None else _checked_counts(counts, len(models))
    merged = {}
    for name in models[0]:
        of_all = [model[name] for model in models]
        kept = _merged(name, of_all, weights, parameters, left_out.get(name, ()))
        if kept is not None:
            merged[name] = kept
    if not merged:
        raise ValueError(message("exclude", "leave something to merge", "all layers"))
    return result_like(states[0], merged, like)


def _checked_models(states: Any) -> list[dict[str, dict[str, Any]]]:
    """The layers of each, as `to_dict` writes them."""
    if not isinstance(states, (list, tuple)) or not states:
        remedy = "Give a list of one or more."
        raise TypeError(message("states", "be a sequence of states, mappings or modules", a_type(states), remedy))
    models: list[Layers] = [layers_of(one) for one in states]
    for i, model in enumerate(models):
        if model.keys() != models[0].keys():
            different = ", ".join(sorted(map(str, model.keys() ^ models[0].keys())))
            raise ValueError(message("states", "have the same layers", f"others at {i}: {different}"))
    return [{name: state.to_dict() for name, state in model.items()} for model in models]


def _checked_exclusions(exclude: Any, layers: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """By layer, the entries that are left out."""
    if isinstance(exclude, str):
        raise TypeError(message("exclude", "be several names of layers", repr(exclude), f"Use [{exclude!r}]."))
    words = dict(exclude) if isinstance(exclude, Mapping) else dict.fromkeys(exclude, "both")
    if unknown := [name for name in words if name not in layers]:
        raise ValueError(message("exclude", f"name layers, {', '.join(map(repr, layers))}", unknown))
    for word in words.values():
        one_of(get_args(Excluded), word, "exclude")
    return {name: _ENTRIES.get(word, sum(_ENTRIES.values(), ())) for name, word in words.items()}


def _checked_counts(counts: Any, models: int) -> list[int] | Equal:
    if isinstance(counts, str):
        one_of(get_args(Equal), counts, "counts")
        return "equal"
    rule = f"be {models} numbers of values, one for each of states"
    try:
        found = [as_int(count, "counts") for count in counts]
    except TypeError:
        raise TypeError(message("counts", rule, counts)) from None
    if len(found) != models or min(found) < 0 or not sum(found):
        raise ValueError(message("counts", f"{rule}, 0 or more and not all 0", counts))
    return found


def _merged(
    name: str,
    states: list[dict[str, Any]],
    counts: list[int] | Equal | None,
    parameters: Parameters,
    left_out: Sequence[str],
) -> BatchNormState | None:
    """One layer; None if nothing of it is left."""
    first = states[0]
    layer = f" of {name}" if name else ""
    for state in states:
        different = [option for option in _SAME if state[option] != first[option]]
        if different or state.keys() - {"momentum"} != first.keys() - {"momentum"}:
            got = f"others in {', '.join(different or sorted((state.keys() ^ first.keys()) - {'momentum'}))}"
            raise ValueError(message(f"states{layer}", "have the same channels, eps, channel_axis and arrays", got))
    result = {entry: value for entry, value in first.items() if entry not in left_out}
    arrays = [entry for entry in (*PARAMETERS, *STATISTICS) if entry in result]
    if not arrays and left_out:
        return None
    if counts is None:
        _check_counters(layer, states)
    known = isinstance(counts, list)
    values = counts if isinstance(counts, list) else [1] * len(states)
    if "running_mean" in result:
        result |= _pooled(layer, states, values, known=known)
    if parameters == "average":
        for entry in PARAMETERS:
            if entry in result:
                result[entry] = _average([state[entry] for state in states], values).astype(first[entry].dtype)
    return BatchNormState.from_dict(result)


def _average(arrays: Sequence[Any], counts: Sequence[int]) -> Any:
    return np.average(np.stack(arrays).astype(np.float64), axis=0, weights=counts)


def _check_counters(layer: str, states: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless the states have seen as many updates: then they may weigh the same."""
    tracked = [state["tracked"] for state in states if "tracked" in state]
    if not tracked or (tracked[0].all() and all((one == tracked[0]).all() for one in tracked)):
        return
    spans = "; ".join(" to ".join(map(str, sorted({int(one.min()), int(one.max())}))) for one in tracked)
    remedy = "Give counts=, how many values or samples each one's statistics are of; 'equal' if all weigh the same."
    raise ValueError(message("counts", f"be given where counters{layer} are 0 or differ", f"tracked {spans}", remedy))


def _pooled(layer: str, states: Sequence[Mapping[str, Any]], counts: Sequence[int], *, known: bool) -> dict[str, Any]:
    """Running statistics and counters; counts that are not `known` are weights of many values."""
    first = states[0]
    parts = []
    for i, (state, count) in enumerate(zip(states, counts, strict=True)):
        mean, var = (state[entry].astype(np.float64) for entry in STATISTICS)
        if not count:
            continue
        if not (np.isfinite(mean) & np.isfinite(var) & (var >= 0)).all():
            remedy = "Repair it, with cubn.recalibrate say, or give it a count of 0."
            rule = "have finite running statistics and no negative variance"
            raise ValueError(message(f"states{layer}", rule, f"others at {i}", remedy))
        unbiased = known and state["running_variance"] == "unbiased"
        if unbiased and count == 1:
            remedy = "Give counts='equal' if all weigh the same."
            raise ValueError(message("counts", "be 0, or 2 or more values, of an unbiased variance", counts, remedy))
        parts.append(Moments.from_statistics(count, mean, var * ((count - 1) / count) if unbiased else var))
    pooled = reduce(add, parts)
    unbiased = known and first["running_variance"] == "unbiased"
    if unbiased and pooled.count < 2:
        raise ValueError(message("counts", "be 2 or more in all for an unbiased variance", int(pooled.count)))
    values = pooled.mean, pooled.var_unbiased() if unbiased else pooled.var()
    merged = {entry: value.astype(first[entry].dtype) for entry, value in zip(STATISTICS, values, strict=True)}
    used = [state for state, count in zip(states, counts, strict=True) if count]
    return merged | {entry: sum(state[entry] for state in used) for entry in COUNTERS}
