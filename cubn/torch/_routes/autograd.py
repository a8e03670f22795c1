"""Autograd's functions around the operators: what `torch.compile`, `torch.func` and dispatch modes differentiate.

`eager` is the shorter way where none of these is at work.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from cubn.errors import message
from cubn.sync import Comm
from cubn.torch._passes.arguments import Vectors, in_strides
from cubn.torch._passes.counters import Counters
from cubn.torch._routes import communicators, operators

Options = tuple[Any, ...]
"""Those of a backward operator behind `order`: gamma's and beta's dtype, residual, relu, frozen, comm."""


class Forward(Function):
    """y, and what else the operators of training and of frozen statistics return.

    The last arguments are those of the operator, behind its vectors.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        skipped: Tensor | None,
        frozen: bool,
        momentum: float | None,
        eps: float,
        relu: bool,
        comm: int,
    ) -> Any:
        vectors = x, weight, bias, residual, mask, running_mean, running_var
        if frozen:
            return operators.batch_norm_frozen(*vectors, eps, relu, comm)
        order = communicators.forward_order() if comm else None
        return operators.batch_norm_train(*vectors, num_batches_tracked, skipped, order, momentum, eps, relu, comm)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, residual, mask, *_, frozen, _, _, relu, comm = inputs
        _, statistics, bits, exchange = output
        ctx.mark_non_differentiable(statistics, bits, exchange)
        has_bits = residual is not None and relu
        ctx.save_for_backward(x, weight, mask, statistics, bits if has_bits else None, exchange if comm else None)
        dtypes = (None if a is None else a.dtype for a in (weight, bias))
        ctx.options = (*dtypes, residual is not None, relu, frozen, comm)
        ctx.strides = x.stride()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, weight, mask, *left = ctx.saved_tensors
        gradients = _backward(dy, x, weight, mask, *left, ctx.strides, *ctx.options)
        return *gradients, *[None] * 10


class TransformedForward(Forward):
    """With what transforms ask for, and compilers do not know."""

    generate_vmap_rule = True  # by those of the operators

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        remedy = "Use reverse mode: torch.func.grad, vjp or jacrev; or detach the tensor."
        rule = "have no forward-mode tangent"
        raise NotImplementedError(message("x", rule, "a dual tensor", remedy, function="batch_norm"))


def _backward(dy: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    """dx, dgamma, dbeta and dresidual, None where there is none."""
    *_, gamma, beta, residual, _, _, _ = rest
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        gradients = Backward.apply(dy, x, weight, *rest)  # type: ignore[no-untyped-call]
    else:
        gradients = Backward.forward(dy, x, weight, *rest)
    dx, dgamma, dbeta, dresidual = gradients
    return (
        dx,
        None if gamma is None else dgamma,
        None if beta is None else dbeta,
        dresidual if residual else None,
    )


class Backward(Function):
    """The gradients, which may have gradients themselves."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        statistics: Tensor,
        bits: Tensor | None,
        exchange: Tensor | None,
        strides: tuple[int, ...],
        *options: Any,
    ) -> Any:
        x = _as_it_was(x, strides)
        return operators.batch_norm_backward(dy, x, mask, statistics, bits, exchange, _order(options), *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tensors, ctx.strides, ctx.options = inputs[:7], inputs[7], inputs[8:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dy, x, weight, *rest = ctx.saved_tensors
        gamma, beta, residual, *_ = ctx.options
        present = True, gamma is not None, beta is not None, residual
        given = (gradient if is_there else None for gradient, is_there in zip(gradients, present, strict=True))
        ddy, dx, dgamma = DoubleBackward.apply(*given, dy, x, weight, *rest, ctx.strides, *ctx.options)  # type: ignore[no-untyped-call]
        return ddy, dx, None if gamma is None else dgamma, *[None] * (len(rest) + 1 + len(ctx.options))

    generate_vmap_rule = True
    jvp = TransformedForward.jvp


class DoubleBackward(Function):
    """Second derivatives, which have none."""

    generate_vmap_rule = True
    jvp = TransformedForward.jvp

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *given, dy, x, _, mask, statistics, bits, exchange, strides = arguments[:12]
        options, x = arguments[12:], _as_it_was(x, strides)
        return operators.batch_norm_double_backward(
            *given, dy, x, mask, statistics, bits, exchange, _order(options), *options
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError("batch_norm: there are no third derivatives. Detach what was differentiated twice.")


def _as_it_was(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x in the layout of the forward, by which the bits of a ReLU are packed: hooks on saved tensors may bring back
    another. Compilers and transforms have none.
    """
    if x.stride() == strides or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
        return x
    return in_strides(x, strides)


def _order(options: Options) -> Tensor | None:
    comm = options[-1]
    return communicators.backward_order() if comm else None


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
    is_compiling = torch.compiler.is_compiling()
    differentiable = torch.is_grad_enabled()
    if is_compiling and not training:  # what needs a gradient is known then
        needs = [t.requires_grad for t in (x, weight, bias, residual) if t is not None]
        differentiable = differentiable and any(needs)
    in_forward_mode = not is_compiling and torch.autograd.forward_ad._current_level >= 0
    if not (training or differentiable or in_forward_mode):
        y: Tensor = operators.batch_norm_inference(x, weight, bias, residual, mask, mean, var, eps, relu)
        return y
    if is_compiling and residual is x:
        residual = x.view_as(x)  # no compiler takes a Function that is given one tensor twice
    function = Forward if is_compiling else TransformedForward
    tracked, skipped = counters or (None, None)
    number = 0 if comm is None else communicators.handle(comm)
    y, *_ = function.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, residual, mask, mean, var, tracked, skipped, not training, momentum, eps, relu, number
    )
    return y
