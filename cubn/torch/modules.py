"""Batch norm modules: torch's own, computed by cubn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from cubn.torch._batch_norm import _BatchNorm


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


class _BatchNormAddReLU(_BatchNorm):
    """What the modules with a residual share. They are batch norms of torch, but for the residual that they ask for."""

    _fused_relu = _fused_residual = True

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor: ...  # type: ignore[override]

    def forward(self, input: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self._normalize(input, residual, mask)


class BatchNormAddReLU1d(_BatchNormAddReLU, nn.BatchNorm1d):
    """Batch norm, then the addition of a residual, then ReLU: `bn(x, residual)`."""


class BatchNormAddReLU2d(_BatchNormAddReLU, nn.BatchNorm2d):
    """Batch norm, then the addition of a residual, then ReLU: `bn(x, residual)`."""


class BatchNormAddReLU3d(_BatchNormAddReLU, nn.BatchNorm3d):
    """Batch norm, then the addition of a residual, then ReLU: `bn(x, residual)`."""
