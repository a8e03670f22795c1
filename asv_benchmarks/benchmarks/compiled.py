"""The operations as torch.compile makes them of torch's own functions, with inductor, for one shape."""

from collections.abc import Callable

import torch

from .workloads import EPS, MOMENTUM, Arrays, all_but_channels, operations

TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the largest value of a result: sums over a channel are in float32, in another order."""


def forward_train(a: Arrays) -> object:
    y = torch.nn.functional.batch_norm(a.x, a.running_mean, a.running_var, a.gamma, a.beta, True, MOMENTUM, EPS)
    return a.y.copy_(y)  # without memory for y: inductor writes into a.y


def forward(a: Arrays) -> object:
    y = torch.nn.functional.batch_norm(a.x, a.running_mean, a.running_var, a.gamma, a.beta, False, MOMENTUM, EPS)
    return a.y.copy_(y)


def moments(a: Arrays) -> object:
    return torch.var_mean(a.x, all_but_channels(a.x))


def backward(a: Arrays) -> tuple[torch.Tensor, ...]:
    """What autograd has inductor compile for a batch norm, without what autograd does around it."""
    given = (a.dy, a.x, a.gamma, a.running_mean, a.running_var, a.mean, a.invstd, True, EPS, [True, True, True])
    return torch.ops.aten.native_batch_norm_backward(*given)


def backward_into_dx(a: Arrays) -> tuple[torch.Tensor, ...]:
    dx, dgamma, dbeta = backward(a)
    return a.dx.copy_(dx), dgamma, dbeta


FUNCTIONS = {
    "forward_train": forward_train,
    "forward": forward,
    "moments": moments,
    "backward": backward,
    "backward into dx": backward_into_dx,
}


def compiled_operations(a: Arrays) -> dict[str, Callable[[], object]]:
    """Compiled, called once and compared with what eager torch gives.

    Raises
    ------
    RuntimeError
        Where torch.compile does not work, as without a C++ compiler; the message is torch's.
    """
    torch.compiler.reset()  # or the shapes of other arrays count against the limit of compilations
    eager = operations(a)
    calls = {}
    for name, function in FUNCTIONS.items():
        compiled = torch.compile(function, dynamic=False, fullgraph=True)
        expected = [result.clone() for result in _results(eager[name].torch())]
        for got, wanted in zip(_results(compiled(a)), expected, strict=False):
            error = (got - wanted).abs().max() / wanted.abs().max()
            if not error <= TOLERANCE[a.x.dtype]:
                raise AssertionError(f"torch.compile's {name} differs from torch's by {error:.1e} of the largest value")
        calls[name] = lambda compiled=compiled: compiled(a)
    return calls


def _results(returned: object) -> tuple[torch.Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)
