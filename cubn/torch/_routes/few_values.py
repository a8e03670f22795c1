"""Training on no value per channel, or on one."""

from __future__ import annotations

from torch import Tensor

from cubn._arguments import shown
from cubn._state.arrays import STATISTICS
from cubn.errors import message
from cubn.torch._passes.arguments import Vectors
from cubn.torch._passes.counters import Counters
from cubn.torch._passes.recomputation import recomputing


def are_few(x: Tensor) -> bool:
    """Whether there is at most one value per channel."""
    return x.ndim > 1 and x.numel() <= x.size(1)


def train(x: Tensor, vectors: Vectors, counters: Counters | None, residual: Tensor | None) -> Tensor:
    """An empty y as torch's is, through which zeros flow back; the update is counted, as one that was skipped.

    No ReLU would change it. Of one value there is no variance: a ValueError.
    """
    if x.numel():
        remedy = (
            "The variance of one value is 0, so its y would be bias whatever it is: use a larger batch, or eval() or "
            "freeze(), which take the running statistics."
        )
        rule = "have more than one value per channel in training"
        raise ValueError(message("input", rule, shown(x), remedy, function="batch_norm"))
    if not x.is_floating_point():
        raise TypeError(message("input", "be of floating point", shown(x), function="batch_norm"))
    for name, vector in zip(("weight", "bias", *STATISTICS), vectors, strict=True):
        if vector is not None and vector.numel() != x.size(1):
            rule = f"have shape ({x.size(1)},), one value per channel"
            raise ValueError(message(name, rule, shown(vector), function="batch_norm"))
    weight, bias, _, _ = vectors
    y = x.clone()
    if weight is not None:
        y = y * weight.sum()
    if bias is not None:
        y = y + bias.sum()
    if residual is not None:
        y = y + residual
    if counters is not None and not recomputing():
        for counter in counters:
            counter.add_(1)
    return y
