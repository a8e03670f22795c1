"""Batch norm modules: torch's own, computed by cubn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cubn.sync import Comm
from cubn.torch._normalize import normalize
from cubn.torch._passes import Counters
from cubn.torch._pool import Pool


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What all of cubn's modules share."""

    _fused_relu = False  # whether a ReLU is part of it, and
    _fused_residual = False  # a residual, which is added before it

    skipped: Tensor | None
    _pool: Pool | None = None  # inside `accumulate`

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        comm: Comm | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        skipped = None
        if track_running_stats:
            skipped = torch.zeros(num_features, dtype=torch.int64, device=device)
        self.register_buffer("skipped", skipped, persistent=False)
        self.comm = comm
        self.frozen = False

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._normalize(input, None, mask)

    def _normalize(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        mean, var, tracked = self.running_mean, self.running_var, self.num_batches_tracked
        training = (self.training and not self.frozen) or mean is None
        counters = None if tracked is None or self.skipped is None else Counters(tracked, self.skipped)
        pool = self._pool if training else None
        if pool is not None:
            mean = var = counters = None
        y = normalize(
            x,
            (self.weight, self.bias, mean, var),
            counters,
            training=training,
            momentum=self.momentum,
            eps=self.eps,
            mask=mask,
            residual=residual,
            relu=self._fused_relu,
            comm=self.comm,
        )
        if pool is not None:
            pool.add(x, mask, self.comm)
        return y


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, computed by cubn."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, computed by cubn."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, computed by cubn."""


class BatchNormReLU1d(BatchNorm1d):
    """Batch norm, then ReLU."""

    _fused_relu = True


class BatchNormReLU2d(BatchNorm2d):
    """Batch norm, then ReLU."""

    _fused_relu = True


class BatchNormReLU3d(BatchNorm3d):
    """Batch norm, then ReLU."""

    _fused_relu = True


class BatchNormAddReLU1d(BatchNorm1d):
    """Batch norm, then the addition of a residual, then ReLU: `bn(x, residual)`."""

    _fused_relu = _fused_residual = True

    def forward(self, input: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self._normalize(input, residual, mask)


class BatchNormAddReLU2d(BatchNorm2d):
    """Batch norm, then the addition of a residual, then ReLU: `bn(x, residual)`."""

    _fused_relu = _fused_residual = True
    forward = BatchNormAddReLU1d.forward  # type: ignore[assignment]


class BatchNormAddReLU3d(BatchNorm3d):
    """Batch norm, then the addition of a residual, then ReLU: `bn(x, residual)`."""

    _fused_relu = _fused_residual = True
    forward = BatchNormAddReLU1d.forward  # type: ignore[assignment]
