"""What the networks have behind a convolution: batch norm, with an addition and a ReLU or without, by each contestant.

torch's and cubn's layers are their modules. Timed call by call are `forward_train(x, state, residual=, relu=)` and
`backward(dy, saved)`, as cubn has them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import cubn.torch
from cubn.gradients import Gradients


class BatchNormFunction(torch.autograd.Function):
    """The two calls, as autograd wants them. Not `once_differentiable`, which costs more than a small backward: cubn
    itself refuses a dy that requires a gradient.
    """

    @staticmethod
    def forward(ctx, x, residual, gamma, beta, layer):
        given = None if residual is None else residual.detach()
        # Not save_for_backward: a Saved holds x, notices its changes as torch does, and has no tensor to replace in it.
        y, ctx.saved = layer.calls.forward_train(x.detach(), layer.state, residual=given, relu=layer.relu)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx, dy):
        saved, ctx.saved = ctx.saved, None  # so that x is freed with the layer's backward, not with the graph
        dx, dgamma, dbeta, dresidual = ctx.layer.calls.backward(dy, saved)
        return dx, dresidual, dgamma, dbeta, None


apply = super(torch.autograd.Function, BatchNormFunction).apply
"""What `BatchNormFunction.apply` comes to outside of torch.func, without looking for its transformations."""


class BatchNorm(nn.BatchNorm2d):
    """torch's parameters and buffers, of any rank, and calls of a contestant that are timed."""

    def __init__(self, channels: int, relu: bool = False, calls: Any = cubn) -> None:
        super().__init__(channels)
        self.relu, self.calls = relu, calls
        self.state = cubn.BatchNormState.from_module(self)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return apply(x, residual, self.weight, self.bias, self)


class Torch:
    """The operators that torch's own modules come to, in one call each way."""

    @staticmethod
    def forward_train(
        x: torch.Tensor, state: cubn.BatchNormState, residual: torch.Tensor | None = None, relu: bool = False
    ) -> tuple[torch.Tensor, tuple[object, ...]]:
        of_state = (state.gamma, state.beta, state.running_mean, state.running_var)
        y, mean, invstd = torch.native_batch_norm(x, *of_state, True, state.momentum, state.eps)
        if residual is not None:
            y.add_(residual)
        if relu:
            y.relu_()
        return y, (x, state, mean, invstd, y if relu else None, residual is not None)

    @staticmethod
    def backward(dy: torch.Tensor, saved: tuple[object, ...]) -> Gradients[torch.Tensor]:
        x, state, mean, invstd, y, added = saved
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        of_forward = (x, state.gamma, state.running_mean, state.running_var, mean, invstd, True, state.eps)
        of_norm = torch.ops.aten.native_batch_norm_backward(dy, *of_forward, [True, True, True])
        return Gradients(*of_norm, dy if added else None)


class ThenReLU(nn.Module):
    """A layer, an addition and a ReLU by torch, in place as torchvision's networks have them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm(x)
        if residual is not None:
            y = y.add_(residual)
        return nn.functional.relu_(y)


class JoinFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy, dy


class Join(nn.Module):
    """Nothing, but that a shortcut has its backward as if it had been added."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return x if residual is None else JoinFunction.apply(x, residual)


class Layers(NamedTuple):
    """What a contestant makes for so many channels."""

    norm: Callable[[int], nn.Module]
    norm_relu: Callable[[int], nn.Module]
    norm_add_relu: Callable[[int], nn.Module]  # takes a residual, too


def with_relu_apart(norm: Callable[[int], nn.Module]) -> Layers:
    def then_relu(channels: int) -> nn.Module:
        return ThenReLU(norm(channels))

    return Layers(norm, then_relu, then_relu)


def with_relu_timed(calls: Any) -> Layers:
    def fused(channels: int) -> nn.Module:
        return BatchNorm(channels, relu=True, calls=calls)

    return Layers(lambda channels: BatchNorm(channels, calls=calls), fused, fused)


def contestants(axes: int) -> dict[str, Layers]:
    """Layers by contestant, for x of so many axes. "none" has no batch norm, "bare" no addition and no ReLU either."""
    rank = f"{max(axes - 2, 1)}d"
    ours = (getattr(cubn.torch, f"BatchNorm{what}{rank}") for what in ("", "ReLU", "AddReLU"))
    return {
        "torch": with_relu_apart(getattr(nn, f"BatchNorm{rank}")),
        "cubn": with_relu_apart(getattr(cubn.torch, f"BatchNorm{rank}")),
        "fused": Layers(*ours),
        "none": with_relu_apart(nn.Identity),
        "bare": Layers(nn.Identity, lambda channels: Join(), lambda channels: Join()),
    }
