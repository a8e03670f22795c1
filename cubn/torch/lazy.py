"""Batch norm modules that count the channels of their first input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.types import Device

from cubn.sync import Comm
from cubn.torch._batch_norm import _BatchNorm
from cubn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d


class _LazyBatchNorm(nn.modules.batchnorm._LazyNormBase, _BatchNorm):
    """Before its first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        comm: Comm | None = None,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.comm = comm
        self._widen_statistics()

    def initialize_parameters(self, input: Tensor, *rest: object) -> None:
        """Make what is still to be made; what a state_dict brought is there."""
        self.num_features = input.shape[1]
        tensors = (*self._parameters.values(), *self._buffers.values())
        lazy: list[Any] = [tensor for tensor in tensors if tensor is not None and is_lazy(tensor)]
        for tensor in lazy:
            tensor.materialize((self.num_features,))
        if lazy:
            self.reset_parameters()


class LazyBatchNorm1d(_LazyBatchNorm, nn.LazyBatchNorm1d):
    """A `BatchNorm1d` that counts the channels of its first input, and from then on is one.

    Parameters
    ----------
    eps, momentum, affine, track_running_stats, device, dtype, bias, comm
        As in `BatchNorm2d`.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> bn = cubn.torch.LazyBatchNorm1d()
    >>> y = bn(torch.randn(4, 5))
    >>> type(bn).__name__, bn.num_features
    ('BatchNorm1d', 5)
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, nn.LazyBatchNorm2d):
    """A `BatchNorm2d` that counts the channels of its first input, and from then on is one.

    Parameters
    ----------
    eps, momentum, affine, track_running_stats, device, dtype, bias, comm
        As in `BatchNorm2d`.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> bn = cubn.torch.LazyBatchNorm2d()
    >>> y = bn(torch.randn(4, 5, 6, 6))
    >>> type(bn).__name__, bn.num_features
    ('BatchNorm2d', 5)
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, nn.LazyBatchNorm3d):
    """A `BatchNorm3d` that counts the channels of its first input, and from then on is one.

    Parameters
    ----------
    eps, momentum, affine, track_running_stats, device, dtype, bias, comm
        As in `BatchNorm2d`.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> bn = cubn.torch.LazyBatchNorm3d()
    >>> y = bn(torch.randn(4, 5, 6, 6, 6))
    >>> type(bn).__name__, bn.num_features
    ('BatchNorm3d', 5)
    """

    cls_to_become = BatchNorm3d
