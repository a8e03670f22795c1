"""The batch norms of a PyTorch model: what each holds, by its path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def batch_norms(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and contents of each module with running statistics, or that could have them; a shared one once.

    Also of modules of other packages that have `running_mean` and `running_var`. Lazy ones hold nothing yet.
    """
    for path, module in model.named_modules():
        if _is_batch_norm(module) and not any(is_lazy(held) for held in _tensors(module).values()):
            yield path, _contents(module)


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return hasattr(module, "running_mean") and hasattr(module, "running_var")


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    names = {
        "gamma": "weight",
        "beta": "bias",
        "running_mean": "running_mean",
        "running_var": "running_var",
        "tracked": "num_batches_tracked",
        "skipped": "skipped",
    }
    found = {name: getattr(module, attribute, None) for name, attribute in names.items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _contents(module: nn.Module) -> dict[str, Any]:
    """The entries of a layer. A momentum of None is the cumulative average in torch; without the attribute, unknown."""
    known = {name: getattr(module, name, None) for name in ("num_features", "eps", "momentum")}
    if known["momentum"] is None and hasattr(module, "momentum"):
        known["momentum"] = "cumulative"
    return {**_tensors(module), **known, "running_variance": "unbiased"}
