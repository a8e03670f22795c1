"""Batch norms of many batches: what `torch.func.vmap` makes of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cubn.errors import message


def one_by_one(
    function: Callable[..., Any],
    info: Any,
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
    written: Sequence[int] = (),
) -> tuple[Any, Any]:
    """A function of each element along the mapped axes, and where its results have that axis.

    What it writes, arguments of these indices, must be mapped too: one tensor cannot take what becomes of several.
    """
    for i in written:
        if arguments[i] is not None and in_dims[i] is None:
            remedy = (
                "Map over a module of its own for each (torch.func.stack_module_state), put the module into eval mode, "
                "freeze it, or make it with track_running_stats=False."
            )
            rule = "be mapped by vmap along with x, where training updates them"
            raise RuntimeError(message("the running statistics", rule, "one for all", remedy, function="batch_norm"))
    results = [
        function(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if not isinstance(results[0], tuple):
        return torch.stack(results), 0
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0,) * len(results[0])
