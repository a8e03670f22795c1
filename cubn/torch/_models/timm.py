"""timm's batch norms, which have an activation: known by name, so that timm is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import Proxy

from cubn.torch._batch_norm import _BatchNorm
from cubn.torch.modules import BatchNorm2d
from cubn.torch.sync_batch_norm import SyncBatchNorm

if TYPE_CHECKING:
    _Base = _BatchNorm
else:
    _Base = object


class _Activated(_Base):
    """Then dropping, then the activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(input, mask)
        if isinstance(y, Proxy):  # which stands for all of it
            return y
        for part in activation(self) or ():
            y = part(y)
        return y


class BatchNormAct2d(_Activated, BatchNorm2d):
    """timm's `BatchNormAct2d`, its batch norm computed by cubn."""


class SyncBatchNormAct(_Activated, SyncBatchNorm):
    """timm's `SyncBatchNormAct`, its batch norm computed by cubn."""


def activation(module: nn.Module) -> tuple[nn.Module, ...] | None:
    """What a batch norm of timm's, converted or not, does to what it normalised; None for any other module."""
    if not isinstance(module, _Activated) and counterpart(type(module)) is None:
        return None
    return tuple(module._modules[name] for name in ("drop", "act") if name in module._modules)  # type: ignore[misc]


def counterpart(cls: type) -> Any:
    """Ours of a class of timm's, or None."""
    if not cls.__module__.startswith("timm."):
        return None
    return {"BatchNormAct2d": BatchNormAct2d, "SyncBatchNormAct": SyncBatchNormAct}.get(cls.__qualname__)
