"""Batch norms of many batches: what `torch.func.vmap` makes of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cubn.errors import message

_MAPPED = "be mapped along with x where they are updated"

Rule = Callable[..., tuple[Any, Any]]


def one_by_one(operator: Any) -> Rule:
    """The rule that calls the operator with each element along the mapped axes: the bits are those of each batch.

    What it writes must be mapped too: one tensor cannot take what becomes of several.
    """
    names = [a.name for a in operator._schema.arguments]
    written = [i for i, a in enumerate(operator._schema.arguments) if a.alias_info and a.name != "order"]

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        for i in written:
            if arguments[i] is not None and in_dims[i] is None:
                remedy = (
                    "Give each batch running statistics of its own (torch.func.stack_module_state), or use eval(), "
                    "freeze() or track_running_stats=False."
                )
                raise RuntimeError(
                    message(names[i], _MAPPED, "one for all batches", remedy, function="vmap of batch_norm")
                )
        results = [
            operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if not isinstance(results[0], tuple):
            return torch.stack(results), 0
        return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
