"""Batch normalization for PyTorch, bitwise reproducible: modules, a function, and what converts a model."""

from cubn.torch import functional
from cubn.torch.invariance import BatchInvariance, batch_invariance
from cubn.torch.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from cubn.torch.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAddReLU1d,
    BatchNormAddReLU2d,
    BatchNormAddReLU3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
)
from cubn.torch.statistics import accumulate, keep_statistics

__all__ = [
    "BatchInvariance",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAddReLU1d",
    "BatchNormAddReLU2d",
    "BatchNormAddReLU3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "accumulate",
    "batch_invariance",
    "functional",
    "keep_statistics",
]
