"""Batch norm of a tensor, by the route that fits what is going on: eager, compiled, transformed, exported."""

from __future__ import annotations

from torch import Tensor

from cubn.sync import Comm
from cubn.torch import _eager, _few_values
from cubn.torch._passes import Counters, Vectors


def normalize(
    x: Tensor,
    vectors: Vectors,
    counters: Counters | None = None,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    comm: Comm | None = None,
) -> Tensor:
    """y, differentiable by x, weight, bias and residual.

    training: by the batch's statistics, with an update of the running ones where there are any; else by the running
    statistics, which are constants.
    """
    if training and comm is None and _few_values.are_few(x):
        return _few_values.train(x, vectors, counters, residual, relu)
    return _eager.batch_norm(x, vectors, counters, training, momentum, eps, mask, residual, relu, comm)
