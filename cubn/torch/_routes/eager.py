"""Autograd's functions in eager mode: the shortest way from a module to the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from cubn.backends.protocol import ReluMask
from cubn.sync import Comm
from cubn.torch import _passes
from cubn.torch._passes.arguments import Left, Vectors
from cubn.torch._passes.counters import Counters
from cubn.torch._passes.relu_mask import as_relu_mask, as_tensor
from cubn.torch._routes import autograd


class Given(NamedTuple):
    """What has no gradient. One argument of the Function, since each of them costs."""

    running_mean: Tensor | None
    running_var: Tensor | None
    counters: Counters | None
    mask: Tensor | None
    frozen: bool
    relu: bool
    momentum: float | None
    eps: float
    comm: Comm | None


class BatchNorm(Function):
    """Training, or with `frozen` normalisation by the running statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, given: Given
    ) -> Tensor:
        mean, var, counters, mask, frozen, relu, momentum, eps, comm = given
        vectors: Vectors = weight, bias, mean, var
        if frozen:
            result = _passes.frozen(x, vectors, eps=eps, mask=mask, residual=residual, relu=relu, comm=comm)
        else:
            result = _passes.train(
                x, vectors, counters, momentum=momentum, eps=eps, mask=mask, residual=residual, relu=relu, comm=comm
            )
        y, ctx.left, relu_mask = result
        bits, ctx.layout = (None, None) if relu_mask is None else as_tensor(relu_mask)
        ctx.save_for_backward(x, weight, mask, bits)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mask, bits = ctx.saved_tensors
        left, relu_mask = ctx.left, None if bits is None else as_relu_mask(bits, ctx.layout)
        if torch.is_grad_enabled():
            return *Backward.apply(dy, x, weight, mask, left, relu_mask), None  # type: ignore[no-untyped-call]
        dx, dgamma, dbeta, dresidual = _passes.backward(dy, x, mask, left, relu_mask)
        return dx, dgamma, dbeta, dresidual, None


class Backward(Function):
    """The gradients, where they are to have gradients themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        left: Left,
        relu_mask: ReluMask | None,
    ) -> Any:
        ctx.save_for_backward(dy, x, weight, mask)
        ctx.left, ctx.relu_mask = left, relu_mask
        ctx.set_materialize_grads(False)
        return tuple(_passes.backward(dy, x, mask, left, relu_mask))

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        gradients = DoubleBackward.apply(ctx.left, ctx.relu_mask, *ctx.saved_tensors, *given)  # type: ignore[no-untyped-call]
        return *gradients, None, None, None


class DoubleBackward(Function):
    """Second derivatives, which have none."""

    @staticmethod
    def forward(
        ctx: Any,
        left: Left,
        relu_mask: ReluMask | None,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        *given: Tensor | None,
    ) -> Any:
        return tuple(_passes.double_backward(given, dy, x, mask, left, relu_mask))

    backward = staticmethod(autograd.DoubleBackward.backward)


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
    """See `cubn.torch._routes.normalize`."""
    weight, bias, mean, var = vectors
    if not training and not (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
    ):
        return _passes.inference(x, vectors, eps=eps, mask=mask, residual=residual, relu=relu)
    given = Given(mean, var, counters, mask, not training, relu, momentum, eps, comm)
    y: Tensor = _apply(x, weight, bias, residual, given)
    return y


# Without the Python around it, which is for transformations and default arguments: neither comes this way.
_apply: Any = super(Function, BatchNorm).apply
