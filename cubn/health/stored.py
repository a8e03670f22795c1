"""Batch norms among what was stored: which arrays of a state_dict or a tree of variables belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cubn._arguments import plain

_NAMES = {
    "running_mean": "running_mean",
    "running_var": "running_var",
    "num_batches_tracked": "tracked",
    "skipped": "skipped",
    "weight": "gamma",
    "bias": "beta",
    "gamma": "gamma",
    "beta": "beta",
    "tracked": "tracked",
    "mean": "running_mean",
    "var": "running_var",
    "scale": "gamma",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""The last part of a key, in PyTorch, cubn, Flax and Keras: which of a layer's arrays it is."""

_COLLECTIONS = ("params", "batch_stats")
"""Of Flax: the first part of a path, which is no part of a layer's name."""

_BIASED = ("mean", "var", "moving_mean", "moving_variance")
"""Running variances under these names average m2 / count."""


def is_a_state(entries: Mapping[Any, Any]) -> bool:
    """Whether this is what `BatchNormState.to_dict` wrote down."""
    return "num_features" in entries and "channel_axis" in entries


def of_state(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """A layer's entries from those of `to_dict`, which leaves out a momentum of None."""
    found = {str(name): plain(entries[name]) for name in entries if name != "channel_axis"}
    return {"running_variance": "unbiased", **found, "momentum": found.get("momentum", "cumulative")}


def batch_norms(tree: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and entries of the layers with running statistics, in the order in which they are met.

    Keys may be joined by dots or slashes, or nested. What has no running statistics of one axis is no batch norm, or
    one that nothing can be said of.
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, value in _leaves(tree, ()):
        *parents, last = path
        if parents and parents[0] in _COLLECTIONS:
            parents = parents[1:]
        if last in _NAMES:
            group = groups.setdefault(".".join(parents), {})
            group.setdefault(_NAMES[last], value)
            if last in _BIASED:
                group["running_variance"] = "biased"
    for name, group in groups.items():
        if _one_axis(group.get("running_mean")) and _one_axis(group.get("running_var")):
            yield name, group


def _leaves(tree: Mapping[Any, Any], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key in tree:
        path = (*above, *str(key).replace("/", ".").split("."))
        value = getattr(tree[key], "value", tree[key]) if above and _is_variable(tree[key]) else tree[key]
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield path, value


def _is_variable(value: Any) -> bool:
    """Whether it is one of Flax's boxes around an array."""
    return type(value).__module__.partition(".")[0] == "flax" and hasattr(value, "value")


def _one_axis(value: Any) -> bool:
    return len(getattr(value, "shape", ())) == 1 or isinstance(value, list)
