"""Small networks, what a training leaves in them, and whether two trainings left the same bits."""

import torch
from torch import nn

import cubn.torch
from tests.torch.comparing import same


def network(norm=cubn.torch.BatchNorm1d, **options):
    """Two batch norms, the second behind the first."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), norm(5, **options), nn.ReLU(), nn.Linear(5, 4), norm(4, **options))


def batches(steps=3, N=8, features=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, features, generator=generator) * 3 + 1 for _ in range(steps)]


def step(model, x, forward=None):
    """y and the gradient of x; those of the parameters are added up in the model."""
    x = x.clone().requires_grad_()
    y = (forward or model)(x)
    (y * torch.arange(y.shape[-1], device=y.device)).sin().sum().backward()
    return [y.detach(), x.grad]


def train(model, forward=None, steps=3):
    """Everything that is to have the same bits however the forward was called."""
    seen = [tensor for x in batches(steps) for tensor in step(model, x, forward)]
    return seen + [parameter.grad for parameter in model.parameters()] + list(statistics(model).values())


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(got, expected):
    assert len(got) == len(expected)
    for name in expected if isinstance(expected, dict) else range(len(expected)):
        assert same(got[name], expected[name]), f"{name}: {got[name]} is not {expected[name]}"


def assert_like_state(layer, state):
    """The running statistics and counters of a layer are those of a state of the core."""
    for name in ("running_mean", "running_var"):
        assert (getattr(layer, name).numpy() == getattr(state, name)).all(), name
    assert (layer.num_batches_tracked.item() == state.tracked).all()
    assert (layer.skipped.numpy() == state.skipped).all()
