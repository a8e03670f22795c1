"""Rules on what ranks that should hold the same hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn._state.arrays import ARRAYS
from cubn._state.counted import COUNTERS
from cubn.health.finding import Severity
from cubn.health.layer import Float64, Layer
from cubn.health.rules.measures import eps_of
from cubn.health.rules.registry import Channels, Found, Network, rule

ROUNDING = 1e-5
"""Of outputs: what another order of additions does in float32, and no more."""


@rule("ranks")
def ranks_disagree(layer: Layer, network: Network) -> Iterator[Found]:
    """Ranks hold different parameters, running statistics, options or counts of one layer."""
    if absent := [rank for rank, other in layer.ranks.items() if other is None]:
        yield Found("error", f"{named(absent)} has no such layer", evidence={"ranks": absent}, cause="other models")
    others = {rank: other for rank, other in layer.ranks.items() if other is not None}
    for name in ("num_features", "eps", "momentum", "running_variance", "dtypes"):
        said = {
            rank: getattr(other, name) for rank, other in others.items() if getattr(other, name) != getattr(layer, name)
        }
        if said:
            what = f"{name} differs on {named(list(said))}"
            evidence = {"here": getattr(layer, name), **{f"rank {rank}": value for rank, value in said.items()}}
            yield Found("error", what, None, evidence, "other configurations", "make the models from one")
    same_size = {rank: other for rank, other in others.items() if other.num_features == layer.num_features}
    for name in (*ARRAYS, *COUNTERS):
        yield from _in_values(layer, same_size, name)


def _in_values(layer: Layer, others: dict[int, Layer], name: str) -> Iterator[Found]:
    """Channels whose value of one array differs."""
    mine = getattr(layer, name)
    differs: dict[int, Channels] = {}
    for rank, other in others.items():
        theirs = getattr(other, name)
        if (mine is None) != (theirs is None):
            yield Found("error", f"{name} is missing on some ranks", None, {"ranks": [rank]}, "other configurations")
        elif mine is not None and not np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f"):
            differs[rank] = (mine != theirs) & ~((mine != mine) & (theirs != theirs))
    if not differs:
        return
    channels = np.logical_or.reduce(list(differs.values()))
    values = {f"rank {rank}": getattr(others[rank], name)[channels] for rank in differs}
    severity, cause = _judged(name, max(_seen(layer, others[rank], name).max(initial=0.0) for rank in differs))
    remedy = "cubn.forward_train(x, state, comm=comm), and a broadcast of rank 0's state now"
    what = f"{name} differs on {named(sorted(differs))}"
    yield Found(severity, what, channels, {"here": mine[channels], **values}, cause, remedy)


def _judged(name: str, seen: float) -> tuple[Severity, str]:
    """How bad it is, and what does it."""
    if name in COUNTERS:
        return "warning", "ranks that did not take the same steps"
    if seen <= ROUNDING:
        return "info", "sums that were added up in another order"
    if name in ("gamma", "beta"):
        return "error", "gradients that were not averaged, or ranks that began with other weights"
    return "error", "statistics of each rank's own samples: a batch norm that is not synchronised"


def _seen(layer: Layer, other: Layer, name: str) -> Float64:
    """How far apart outputs are by the values of one array, where 1 is what batch norm aims at; NaN is far."""
    mine, theirs = getattr(layer, name), getattr(other, name)
    with np.errstate(all="ignore"):
        apart = np.abs(mine - theirs)
        if layer.running_var is not None and name == "running_mean":
            apart = apart / np.sqrt(layer.running_var + eps_of(layer))
        elif name == "running_var":
            apart = apart / (np.minimum(mine, theirs) + eps_of(layer))
        else:
            apart = apart / np.maximum(np.abs(mine), 1.0)
    return np.where((mine == theirs) | ((mine != mine) & (theirs != theirs)), 0.0, np.nan_to_num(apart, nan=np.inf))


def named(ranks: list[int]) -> str:
    """`rank 3`, `ranks 1, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
