"""Batch norm over a process group that is found when it is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from cubn.sync import Comm, check_comm
from cubn.torch._batch_norm import _BatchNorm, _Ranks
from cubn.torch.modules import _BatchNormAddReLU


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm`, computed by cubn: for inputs of 2 axes and more, on the CPU too.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias
        As of `torch.nn.SyncBatchNorm`. Where process_group is None, a training step is taken together with all ranks
        of the default group, if torch.distributed is initialised by then.

    Notes
    -----
    No subclass of `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on the CPU. `comm` may be set to any
    other communicator, and goes before process_group.

    Examples
    --------
    >>> import torch
    >>> from cubn.torch import SyncBatchNorm
    >>> SyncBatchNorm(3)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    process_group: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    @property
    def comm(self) -> Comm | None:
        """What was assigned, or else the process group, where it trains."""
        if self._ranks is not None or not self.training:
            return super().comm
        if self.process_group is not None:
            return self.process_group  # type: ignore[no-any-return]
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return distributed.group.WORLD
        return None

    @comm.setter
    def comm(self, comm: Comm | None) -> None:
        check_comm(comm)
        self._ranks = None if comm is None else _Ranks(comm)

    def _check_input_dim(self, input: Tensor) -> None:
        nn.SyncBatchNorm._check_input_dim(self, input)  # type: ignore[arg-type]


class SyncBatchNormReLU(SyncBatchNorm):
    """SyncBatchNorm, then ReLU."""

    _fused_relu = True


class SyncBatchNormAddReLU(_BatchNormAddReLU, SyncBatchNorm):
    """SyncBatchNorm, then the addition of a residual, then ReLU: `bn(x, residual)`."""
