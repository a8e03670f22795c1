"""Batch normalization for PyTorch, bitwise reproducible: modules, a function, and what converts a model."""

from cubn.torch import functional
from cubn.torch._models.report import Report
from cubn.torch.conversion import convert, restore
from cubn.torch.folding import fold
from cubn.torch.fusion import fuse
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
from cubn.torch.sync_batch_norm import SyncBatchNorm, SyncBatchNormAddReLU, SyncBatchNormReLU

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
    "Report",
    "SyncBatchNorm",
    "SyncBatchNormAddReLU",
    "SyncBatchNormReLU",
    "accumulate",
    "batch_invariance",
    "convert",
    "fold",
    "functional",
    "fuse",
    "keep_statistics",
    "restore",
]
