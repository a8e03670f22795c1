"""A PyTorch user's modules: nothing here is an error to `mypy --strict`. See test_typing.py."""

from typing import assert_type

import torch
import torch.distributed
from mpi4py import MPI
from torch import Tensor, nn

import cubn.torch


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, group: torch.distributed.ProcessGroup | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.after_first = cubn.torch.BatchNormReLU2d(channels, comm=group)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.after_second = cubn.torch.BatchNormAddReLU2d(channels, eps=1e-3, momentum=None, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.after_first(self.first(x), mask)
        assert_type(y, Tensor)
        return self.after_second(self.second(y), x, mask=mask)


class Scaled(cubn.torch.BatchNorm1d):
    """A batch norm of a user's own."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2 * super().forward(input, mask)


def modules() -> list[nn.modules.batchnorm._BatchNorm]:
    norm: type[nn.BatchNorm2d] = cubn.torch.BatchNorm2d
    frozen = cubn.torch.BatchNorm2d(3, device="cpu", dtype=torch.float64).freeze()
    assert_type(frozen, cubn.torch.BatchNorm2d)
    assert_type(frozen.unfreeze().half(), cubn.torch.BatchNorm2d)
    assert_type(frozen.frozen, bool)
    frozen.comm = MPI.COMM_WORLD
    frozen.comm = None
    return [
        norm(3),
        frozen,
        Scaled(3, comm=MPI.COMM_WORLD),
        cubn.torch.BatchNorm3d(3, 1e-5, 0.1, True, False),
        cubn.torch.LazyBatchNorm2d(momentum=None, comm=torch.distributed.group.WORLD),
        cubn.torch.BatchNormAddReLU1d(3),
    ]


def skips(model: nn.Module) -> int:
    found = [module for module in model.modules() if isinstance(module, cubn.torch.BatchNorm2d)]
    return sum(int(module.skipped.sum()) for module in found if module.skipped is not None)
