"""Autograd's functions in eager mode: the shortest way from a module to the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cubn.sync import Comm
from cubn.torch import _passes
from cubn.torch._passes import Counters, Vectors
from cubn.torch._relu_mask import as_relu_mask, as_tensor


class BatchNorm(Function):
    """Training, or with `frozen` normalisation by the running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        counters: Counters | None,
        mask: Tensor | None,
        frozen: bool,
        relu: bool,
        momentum: float | None,
        eps: float,
        comm: Comm | None,
    ) -> Tensor:
        vectors: Vectors = weight, bias, running_mean, running_var
        options: dict[str, Any] = dict(eps=eps, mask=mask, residual=residual, relu=relu, comm=comm)
        if frozen:
            y, left, relu_mask = _passes.frozen(x, vectors, **options)
        else:
            y, left, relu_mask = _passes.train(x, vectors, counters, momentum=momentum, **options)
        ctx.left = left
        bits, ctx.layout = as_tensor(relu_mask)
        ctx.save_for_backward(x, weight, mask, bits)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mask, bits = ctx.saved_tensors
        left, relu_mask = ctx.left, as_relu_mask(bits, ctx.layout)
        if torch.is_grad_enabled():
            dx, dgamma, dbeta, dresidual = Backward.apply(dy, x, weight, mask, left, relu_mask)  # type: ignore[no-untyped-call]
        else:
            dx, dgamma, dbeta, dresidual = _passes.backward(dy, x, mask, left, relu_mask)
        return dx, dgamma, dbeta, dresidual, *[None] * 9


class Backward(Function):
    """The gradients, where they are to have gradients themselves."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, left: Any, relu_mask: Any
    ) -> Any:
        ctx.save_for_backward(dy, x, mask)
        ctx.left, ctx.relu_mask = left, relu_mask
        return tuple(_passes.backward(dy, x, mask, left, relu_mask))

    @staticmethod
    def backward(ctx: Any, ddx: Any, ddgamma: Any, ddbeta: Any, ddresidual: Any) -> Any:
        raise NotImplementedError  # double_backward of the core


def batch_norm(
    x: Tensor,
    vectors: Vectors,
    counters: Counters | None,
    training: bool,
    momentum: float | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    comm: Comm | None,
) -> Tensor:
    """See `cubn.torch._normalize`."""
    weight, bias, mean, var = vectors
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, residual)
    )
    if not training and not differentiable:
        return _passes.inference(x, vectors, eps=eps, mask=mask, residual=residual, relu=relu)
    y: Tensor = _apply(x, weight, bias, residual, mean, var, counters, mask, not training, relu, momentum, eps, comm)
    return y


# Without the Python around it, which is for transformations and default arguments: neither comes this way.
_apply: Any = super(Function, BatchNorm).apply
