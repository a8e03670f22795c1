"""What several tests of the modules need: the pairs of modules, inputs, a training step, whether tensors are equal."""

import torch
from torch import nn

import cubn.torch

PAIRS = {f"{d}d": (getattr(cubn.torch, f"BatchNorm{d}d"), getattr(nn, f"BatchNorm{d}d")) for d in "123"}
"""Cubn's and torch's."""

SHAPES = {"1d": (6, 3), "2d": (4, 3, 5, 2), "3d": (2, 3, 3, 2, 2)}
EPS = torch.finfo(torch.float64).eps


def batch(shape, seed=0, dtype=torch.float32):
    """Normal values whose channels have means and deviations of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, shape[1] + 1, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2))
    return (x * scale + scale - 2).to(dtype)


def step(module, x, *others):
    """y and the gradients of x and of what is given beside it, of one training step; the module's are in its own."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, *others)]
    y = module(*inputs)
    y.backward(batch(y.shape, seed=1, dtype=y.dtype))
    return y.detach(), *(tensor.grad for tensor in inputs)


def same(a, b):
    """Equal in dtype and in every bit that counts."""
    return a.dtype == b.dtype and torch.equal(a, b)


def close(a, b, values):
    """As close as two ways to add up so many float64 values come, each with the errors of the sums it is made of."""
    return a.shape == b.shape and (a - b).abs().max() <= 32 * values * EPS * (1 + b.abs().max())


def statistics(module):
    """Copies of the buffers that a checkpoint has."""
    return {name: buffer.clone() for name, buffer in module.named_buffers() if not name.endswith("skipped")}
