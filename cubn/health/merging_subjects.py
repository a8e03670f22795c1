"""What states can be found in for merging, and what the merged ones are returned in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from cubn._state.arrays import STATISTICS
from cubn.errors import a_type, message
from cubn.state import BatchNormState
from cubn.typing import SupportsDLPack

Layers = dict[str, BatchNormState]

_OF_TORCH = {"gamma": "weight", "beta": "bias", **dict(zip(STATISTICS, STATISTICS, strict=True))}
"""What a torch batch norm calls a state's arrays."""


def layers_of(one: Any) -> Layers:
    """The states in one of the things that are merged, by name."""
    torch = sys.modules.get("torch")
    if isinstance(one, BatchNormState):
        return {"": one}
    if torch is not None and isinstance(one, torch.nn.Module):
        kind = torch.nn.modules.batchnorm._BatchNorm
        found = {path: _of_module(module) for path, module in one.named_modules() if isinstance(module, kind)}
    elif _is_state_dict(one):
        found = _of_state_dict(one)
    elif isinstance(one, Mapping) and all(isinstance(state, BatchNormState) for state in one.values()):
        found = dict(one)
    else:
        rule = "be BatchNormStates, mappings of names to them, torch modules or state_dicts"
        raise TypeError(message("states", rule, a_type(one)))
    if not found:
        raise ValueError(message("states", "hold a batch norm", f"{a_type(one)} without"))
    return found


def result_like(one: Any, merged: Layers, like: SupportsDLPack | None) -> Any:
    """What is returned for things of this kind."""
    if _is_state_dict(one):
        return _state_dict(one, merged)
    if like is not None:
        merged = {name: BatchNormState.from_dict(state.to_dict(like=like), like=like) for name, state in merged.items()}
    if isinstance(one, BatchNormState):
        return merged[""]
    return merged


def _is_state_dict(one: Any) -> bool:
    return isinstance(one, Mapping) and any(str(key).rpartition(".")[2] == "running_mean" for key in one)


def _of_module(bn: Any) -> BatchNormState:
    return BatchNormState.from_arrays(
        **{name: getattr(bn, theirs) for name, theirs in _OF_TORCH.items()},
        num_features=bn.num_features,
        eps=bn.eps,
        momentum=bn.momentum,
        tracked=None if bn.num_batches_tracked is None else int(bn.num_batches_tracked),
        check=False,
    )


def _of_state_dict(entries: Mapping[str, Any]) -> Layers:
    """Their options are not in it, and no part of the result either."""
    paths = [key.removesuffix("running_mean") for key in entries if key.rpartition(".")[2] == "running_mean"]
    found = {}
    for path in paths:
        arrays: dict[str, Any] = {name: entries.get(path + theirs) for name, theirs in _OF_TORCH.items()}
        tracked = int(entries.get(f"{path}num_batches_tracked", 0))
        found[path.removesuffix(".")] = BatchNormState.from_arrays(**arrays, tracked=tracked, check=False)
    return found


def _state_dict(entries: Mapping[str, Any], merged: Layers) -> dict[str, Any]:
    """The merged layers, under the keys and in the dtypes and on the devices of one of the given."""
    found = {}
    for path, state in merged.items():
        arrays = {theirs: getattr(state, name) for name, theirs in _OF_TORCH.items()}
        if state.tracked is not None:
            arrays["num_batches_tracked"] = int(state.tracked.max())
        for theirs, values in arrays.items():
            key = f"{path}.{theirs}" if path else theirs
            if values is not None and key in entries:
                found[key] = entries[key].new_tensor(values)
    return found
