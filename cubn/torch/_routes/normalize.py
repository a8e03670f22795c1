"""Batch norm of a tensor, by the route that fits what is going on: eager, compiled, transformed, exported."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from cubn.sync import Comm
from cubn.torch._passes.arguments import Vectors
from cubn.torch._passes.counters import Counters
from cubn.torch._routes import autograd, eager, export, few_values

# Private in torch: nothing public says how many modes there are, and whether a transform of torch.func is at work.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad


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
    watched = _is_watched(x)
    if watched and export.exporting():
        return export.batch_norm(x, vectors, training, eps, mask, residual, relu)
    if training and comm is None and few_values.are_few(x):
        return few_values.train(x, vectors, counters, residual)
    run = autograd.batch_norm if watched else eager.batch_norm
    return run(x, vectors, counters, training, momentum, eps, mask, residual, relu, comm)


def _is_watched(x: Tensor) -> bool:
    """Whether somebody has to see operators: a compiler, a transform, a mode, forward mode, torch.jit, or a tensor of a
    kind of its own.
    """
    return (
        torch.compiler.is_compiling()
        or (type(x) is not Tensor and type(x) is not Parameter)
        or _transform() is not None
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )
