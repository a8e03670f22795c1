"""Calls on arrays so small that a call costs what is around its arithmetic: by cubn, its modules, aten and torch.nn."""

from collections.abc import Callable
from typing import Any

import torch

import cubn
import cubn.torch

SHAPES = ((2, 8), (8, 16, 2, 2))  # float32
EPS, MOMENTUM = 1e-5, 0.1

Calls = dict[str, Callable[[], object]]
"""By operation."""


def calls(shape: tuple[int, ...]) -> dict[str, Calls]:
    """By contestant, all on the same arrays: cubn on NumPy's and on torch's, aten, modules of torch and of cubn."""
    x, dy = inputs(shape)
    return {
        "numpy": with_cubn(x.numpy(), dy.numpy()),
        "torch": with_cubn(x, dy),
        "aten": with_aten(x, dy),
        "torch.nn": with_module(torch.nn, x, dy),
        "cubn.torch": with_module(cubn.torch, x, dy),
    }


def compiled_calls(shape: tuple[int, ...]) -> dict[str, Calls]:
    """The modules through torch.compile, with inductor, for one shape."""
    x, dy = inputs(shape)
    return {
        "torch.nn, compiled": with_module(torch.nn, x, dy, compiled=True),
        "cubn.torch, compiled": with_module(cubn.torch, x, dy, compiled=True),
    }


def inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dy."""
    x, dy = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    return x, dy


def with_cubn(x: object, dy: object) -> Calls:
    state = cubn.BatchNormState(x.shape[1], eps=EPS, momentum=MOMENTUM, like=x)
    gamma, beta = state.gamma, state.beta
    moments = cubn.moments(x)
    _, saved = cubn.forward_train(x, state)
    return {
        "forward": lambda: cubn.forward(x, state),
        "forward_train": lambda: cubn.forward_train(x, state),
        "backward": lambda: cubn.backward(dy, saved),
        "moments": lambda: cubn.moments(x),
        "normalize": lambda: cubn.normalize(x, moments, gamma=gamma, beta=beta),
        "update": lambda: cubn.update(state, moments),
    }


def with_aten(x: torch.Tensor, dy: torch.Tensor) -> Calls:
    """The bare operators: no module, no autograd."""
    C = x.shape[1]
    gamma, beta, mean, var = torch.ones(C), torch.zeros(C), torch.zeros(C), torch.ones(C)
    forward, backward = torch.ops.aten.native_batch_norm, torch.ops.aten.native_batch_norm_backward
    _, batch_mean, batch_invstd = forward(x, gamma, beta, mean, var, True, MOMENTUM, EPS)
    given = (x, gamma, mean, var, batch_mean, batch_invstd, True, EPS, [True, True, True])
    return {
        "forward": lambda: forward(x, gamma, beta, mean, var, False, MOMENTUM, EPS),
        "forward_train": lambda: forward(x, gamma, beta, mean, var, True, MOMENTUM, EPS),
        "backward": lambda: backward(dy, *given),
    }


def with_module(library: Any, x: torch.Tensor, dy: torch.Tensor, compiled: bool = False) -> Calls:
    """What a model calls: in training autograd records it, in inference nothing needs a gradient."""
    Module = library.BatchNorm1d if x.ndim == 2 else library.BatchNorm2d
    training = Module(x.shape[1], eps=EPS, momentum=MOMENTUM)
    inference = Module(x.shape[1], eps=EPS, momentum=MOMENTUM).eval().requires_grad_(False)
    asked = x.detach().requires_grad_()
    needed = (asked, training.weight, training.bias)
    if compiled:
        training, inference = (torch.compile(one, dynamic=False, fullgraph=True) for one in (training, inference))
    made: Calls = {
        "forward": lambda: inference(x),
        "forward_train": lambda: training(asked),
        "step": lambda: torch.autograd.grad(training(asked), needed, dy),
    }
    if not compiled:  # whose graph serves a single backward
        y = training(asked)
        made["backward"] = lambda: torch.autograd.grad(y, needed, dy, retain_graph=True)
    return made
