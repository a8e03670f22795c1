"""Batch normalisation modules of frameworks, as the arguments of a state."""

from __future__ import annotations

import sys
from typing import Any

from cubn._state.options import STATE
from cubn.errors import message


def of_torch(module: Any) -> dict[str, Any]:
    """A torch.nn batch norm's arrays, options and counter, as `BatchNormState.from_arrays` takes them."""
    torch = sys.modules.get("torch")
    known = () if torch is None else (*(getattr(torch.nn, f"BatchNorm{d}d") for d in "123"), torch.nn.SyncBatchNorm)
    if not isinstance(module, known):
        kind = type(module)
        lazy = kind.__name__.startswith("LazyBatchNorm")
        remedy = (
            "Let it see a batch first: it has no parameters yet."
            if lazy
            else "Of another module, pass the arrays, eps and momentum to from_arrays."
        )
        raise TypeError(
            message("bn", "be a batch norm of torch.nn", kind.__name__, remedy, function=f"{STATE}.from_module")
        )
    return {
        "num_features": module.num_features,
        "gamma": module.weight,
        "beta": module.bias,
        "running_mean": module.running_mean,
        "running_var": module.running_var,
        "tracked": module.num_batches_tracked,
        "eps": module.eps,
        "momentum": module.momentum,
        "channel_axis": 1,
    }
