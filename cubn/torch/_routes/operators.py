"""PyTorch operators: what compilers, transforms and dispatch modes see of batch norm.

None is differentiable by itself, see `autograd`. What is absent among the outputs is an empty tensor. `comm` is a
number of `communicators`, 0 without one; then `order` is None. See `as_tensors` for what a backward is given.

Compiled graphs lie on disk, and know an operator by its name and arguments. One that is to return something else needs
a new name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cubn.double_backward import double_backward
from cubn.torch import _passes
from cubn.torch._passes.arguments import saved as saved_of
from cubn.torch._passes.counters import Counters
from cubn.torch._routes import as_tensors, communicators, fakes
from cubn.torch._routes.vmap import one_by_one

OfForward = tuple[Tensor, Tensor, Tensor, Tensor]
"""y, statistics, bits, exchange."""

LIBRARY: Any = torch.library.Library("cubn", "DEF")  # type: ignore[no-untyped-call]

_X = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask"
_LEFT = "Tensor y, Tensor statistics, Tensor bits, Tensor exchange"
_GIVEN = "Tensor x, Tensor? mask, Tensor statistics, Tensor? bits, Tensor? exchange"
_ORDER = "Tensor(a!)? order"
_KIND = "ScalarType? gamma, ScalarType? beta, bool residual, bool relu, bool frozen, int comm"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _defined(arguments: str, results: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """The operator of a function's name, which computes by it."""

    def operator(function: Callable[..., Any]) -> Any:
        name = function.__name__
        LIBRARY.define(f"{name}({arguments}) -> ({results})", tags=_TAGS)
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, device)
        torch.library.register_fake(f"cubn::{name}", fake, lib=LIBRARY)
        defined = getattr(torch.ops.cubn, name).default
        torch.library.register_vmap(f"cubn::{name}", one_by_one(defined), lib=LIBRARY)
        return defined

    return operator


@_defined(
    f"{_X}, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? skipped, "
    "Tensor(e!)? order, float? momentum, float eps, bool relu, int comm",
    _LEFT,
    fakes.train,
)
def batch_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    skipped: Tensor | None,
    order: Tensor | None,
    momentum: float | None,
    eps: float,
    relu: bool,
    comm: int,
) -> OfForward:
    counters = None
    if num_batches_tracked is not None and skipped is not None:
        counters = Counters(num_batches_tracked, skipped)
    vectors = weight, bias, running_mean, running_var
    return _with_tensors(
        x, residual, mask, _passes.train, vectors, counters, momentum=momentum, eps=eps, relu=relu, comm=comm
    )


@_defined(f"{_X}, Tensor running_mean, Tensor running_var, float eps, bool relu, int comm", _LEFT, fakes.frozen)
def batch_norm_frozen(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    relu: bool,
    comm: int,
) -> OfForward:
    vectors = weight, bias, running_mean, running_var
    return _with_tensors(x, residual, mask, _passes.frozen, vectors, eps=eps, relu=relu, comm=comm)


def _with_tensors(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    run: Any,
    *arguments: Any,
    relu: bool,
    comm: int,
    **options: Any,
) -> OfForward:
    """A pass, and what it leaves as tensors."""
    if residual is not None and relu:
        x, residual = as_tensors.plain(x.detach(), residual.detach())
    group = communicators.of(comm) if comm else None
    y, left, relu_mask = run(x, *arguments, mask=mask, residual=residual, relu=relu, comm=group, **options)
    return y, *as_tensors.to_tensors(x, mask, left, relu_mask)


@_defined(f"{_X}, Tensor running_mean, Tensor running_var, float eps, bool relu", "Tensor y", fakes.inference)
def batch_norm_inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    return _passes.inference(
        x, (weight, bias, running_mean, running_var), eps=eps, mask=mask, residual=residual, relu=relu
    )


@_defined(
    f"Tensor dy, {_GIVEN}, {_ORDER}, {_KIND}",
    "Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dresidual",
    fakes.backward,
)
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    bits: Tensor | None,
    exchange: Tensor | None,
    order: Tensor | None,
    gamma: torch.dtype | None,
    beta: torch.dtype | None,
    residual: bool,
    relu: bool,
    frozen: bool,
    comm: int,
) -> tuple[Tensor, ...]:
    kind = gamma, beta, residual, relu, frozen
    left, relu_mask = as_tensors.from_tensors(x, mask, (statistics, bits, exchange), kind, comm)
    return _present(_passes.backward(dy, x, mask, left, relu_mask), x)


@_defined(
    f"Tensor? ddx, Tensor? ddgamma, Tensor? ddbeta, Tensor? ddresidual, Tensor dy, {_GIVEN}, {_ORDER}, {_KIND}",
    "Tensor ddy, Tensor dx, Tensor dgamma",
    fakes.double_backward,
)
def batch_norm_double_backward(
    ddx: Tensor | None,
    ddgamma: Tensor | None,
    ddbeta: Tensor | None,
    ddresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    bits: Tensor | None,
    exchange: Tensor | None,
    order: Tensor | None,
    gamma: torch.dtype | None,
    beta: torch.dtype | None,
    residual: bool,
    relu: bool,
    frozen: bool,
    comm: int,
) -> tuple[Tensor, ...]:
    kind = gamma, beta, residual, relu, frozen
    left, relu_mask = as_tensors.from_tensors(x, mask, (statistics, bits, exchange), kind, comm)
    saved = saved_of(x, mask, left, relu_mask)
    of_x, of_gamma, of_beta, of_residual = (
        None if a is None else a.detach() for a in (ddx, ddgamma, ddbeta, ddresidual)
    )
    return _present(double_backward(of_x, of_gamma, of_beta, dy.detach(), saved, ddresidual=of_residual), x)


def _present(gradients: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Gradients, and empty tensors for those that are None."""
    return tuple([x.new_empty(0) if gradient is None else gradient for gradient in gradients])
