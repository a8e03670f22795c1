"""One batch norm as rules see it: its arrays in NumPy, whatever it was read from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays
from cubn._arguments import on_host, plain
from cubn._moments import Moments
from cubn._state.arrays import ARRAYS
from cubn._state.counted import COUNTERS
from cubn._state.options import OPTIONS
from cubn._types import FLOATS, NUMBERS
from cubn.errors import a_type, message
from cubn.health import stored
from cubn.state import BatchNormState
from cubn.typing import RunningVariance

Float64 = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters, running statistics, options and counters of one batch norm; None is what is not known.

    Attributes
    ----------
    name : str
        As in the model: a module's path.
    num_features : int
        Channels, C.
    gamma, beta, running_mean, running_var : float64 array of shape (C,), or None
        Widened from what they are stored in; see `dtypes`.
    dtypes : mapping of str to str
        By the names of these arrays, the type they are stored in: "float16", "bfloat16", "float32", "float64".
    eps : float or None
    momentum : float, "cumulative" or None
        The weight of the new value (PyTorch's sense). None: not known.
    running_variance : {"unbiased", "biased"} or None
    tracked, skipped : int64 array of shape (C,), or None
        Updates seen, and those that changed nothing.
    skipped_lately : float64 array of shape (C,), or None
        The share of the latest updates that changed nothing, from who has watched them.
    moments : Moments or None
        Of the layer's inputs, to compare the running statistics with.
    ranks : mapping of int to Layer or None
        By rank, this layer as another rank holds it where that differs; None where the rank has no such layer.
    """

    name: str
    num_features: int
    gamma: Float64 | None = None
    beta: Float64 | None = None
    running_mean: Float64 | None = None
    running_var: Float64 | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    eps: float | None = None
    momentum: float | Literal["cumulative"] | None = None
    running_variance: RunningVariance | None = None
    tracked: Counts | None = None
    skipped: Counts | None = None
    skipped_lately: Float64 | None = None
    moments: Moments | None = None
    ranks: Mapping[int, Layer | None] = field(default_factory=dict)


def layers_of(subject: Any) -> list[Layer]:
    """The batch norms of what a user has, as rules see them.

    Parameters
    ----------
    subject : BatchNormState, torch.nn.Module, flax.nnx.Module, Layer, list or mapping
        A mapping is of names to any of these, a state_dict, a tree of Flax variables, or what a state's `to_dict` gave.

    Returns
    -------
    list of Layer
        In the subject's order. Named by paths in a model, by keys in a mapping; else by their position, or "state".

    Raises
    ------
    TypeError
        If it is none of these.
    ValueError
        If the arrays of a layer do not fit each other.
    """
    return list(_layers(subject, ""))


def _layers(subject: Any, name: str) -> Iterator[Layer]:
    """Those of one subject, under its name."""
    if isinstance(subject, Layer):
        yield replace(subject, name=name) if name else subject
    elif isinstance(subject, BatchNormState):
        yield _of_state(subject, name or "state")
    elif isinstance(subject, Mapping):
        yield from _of_mapping(subject, name)
    elif isinstance(subject, (list, tuple)):
        for index, each in enumerate(subject):
            yield from _layers(each, _below(name, "" if isinstance(each, Layer) else str(index)))
    else:
        for path, entries in _batch_norms(subject):
            yield _layer(_below(name, path) or type(subject).__name__, entries)


def _of_mapping(subject: Mapping[Any, Any], name: str) -> Iterator[Layer]:
    if stored.is_a_state(subject):
        yield _layer(name or "state", stored.of_state(subject))
        return
    arrays = {}
    for key in subject:
        value = subject[key]
        if _holds_subjects(value):
            yield from _layers(value, _below(name, str(key)))
        else:
            arrays[key] = value
    for path, entries in stored.batch_norms(arrays):
        yield _layer(_below(name, path) or "state", entries)


def _holds_subjects(value: Any) -> bool:
    """Whether it is a batch norm by itself or a model, or has one in it, rather than being a tree of arrays."""
    if isinstance(value, Mapping):
        return stored.is_a_state(value) or any(_holds_subjects(value[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return any(map(_holds_subjects, value))
    torch, nnx = sys.modules.get("torch"), sys.modules.get("flax.nnx")
    models = tuple(module.Module for module in (torch and torch.nn, nnx) if module is not None)
    return isinstance(value, (Layer, BatchNormState, *models))


def _batch_norms(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths and entries of a model's batch norms."""
    torch, nnx = sys.modules.get("torch"), sys.modules.get("flax.nnx")
    if torch is not None and isinstance(model, torch.nn.Module):
        from cubn.torch._health.layers import batch_norms

        return batch_norms(model)
    if nnx is not None and isinstance(model, nnx.Module):
        return _of_nnx(nnx, model)
    rule = "be a BatchNormState, a model of PyTorch or Flax, a state_dict, or a list or mapping of these"
    raise TypeError(message("subject", rule, a_type(model)))


def _of_nnx(nnx: Any, model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of Flax, whose momentum is the weight of the old value."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            names = {"gamma": "scale", "beta": "bias", "running_mean": "mean", "running_var": "var"}
            arrays = {name: getattr(getattr(module, held), "value", None) for name, held in names.items()}
            yield (
                ".".join(map(str, path)),
                {
                    **arrays,
                    "num_features": module.num_features,
                    "eps": module.epsilon,
                    "momentum": 1.0 - module.momentum,
                    "running_variance": "biased",
                },
            )


def _of_state(state: BatchNormState, name: str) -> Layer:
    entries = {key: getattr(state, key) for key in (*OPTIONS, *ARRAYS, *COUNTERS) if key != "channel_axis"}
    return _layer(name, entries | {"momentum": "cumulative" if state.momentum is None else state.momentum})


def _layer(name: str, entries: Mapping[str, Any]) -> Layer:
    """A layer of arrays of any library, numbers and words."""
    given = {key: entries[key] for key in (*ARRAYS, *COUNTERS) if entries.get(key) is not None}
    arrays: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for key, value in given.items():
        is_count = key in COUNTERS
        array, dtype = _values(plain(value) if is_count else value, f"{name}: {key}", NUMBERS if is_count else FLOATS)
        if is_count:
            arrays[key] = array.astype(np.int64)
        else:
            arrays[key], dtypes[key] = array.astype(np.float64), dtype
    features = entries.get("num_features") or max((arrays[key].size for key in dtypes), default=0)
    for key, array in arrays.items():
        if array.shape != (features,) and not (key in COUNTERS and array.size == 1):
            rule = f"have shape ({features},), one value per channel"
            raise ValueError(message(f"{name}: {key}", rule, "an array", shape=array.shape))
        arrays[key] = np.broadcast_to(array, (features,)).copy()
    options = {key: entries.get(key) for key in ("eps", "momentum", "running_variance")}
    return Layer(name, int(features), dtypes=dtypes, **arrays, **_numbers(options))


def _numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of any kind as floats; words and None as they are."""
    return {key: float(value) if isinstance(value, Real) else value for key, value in options.items()}


def _values(value: Any, argument: str, dtypes: tuple[str, ...]) -> tuple[NDArray[Any], str]:
    """An array of any library, or lists, in NumPy; and the name of the type it is stored in."""
    if isinstance(value, (list, tuple, int, float)):
        value = np.array(value)
    described = _arrays.describe(value, argument, dtypes, detach=True)
    return on_host(described), described.dtype


def _below(name: str, path: str) -> str:
    return ".".join(part for part in (name, path) if part)
