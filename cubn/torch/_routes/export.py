"""Batch norm by torch's own operators, for programs that are to run without cubn: in another process, in ONNX."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cubn.errors import message
from cubn.torch._passes.arguments import Vectors


def exporting() -> bool:
    """Whether torch.export, or torch.onnx by way of it, or torch.jit.trace is at work."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def batch_norm(
    x: Tensor,
    vectors: Vectors,
    training: bool,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """y by the running statistics, but for its bits: torch rounds as it does."""
    if training:
        remedy = (
            "Call model.eval(); to export a training step, restore() the model first: torch's own modules train then."
        )
        raise RuntimeError(
            message("model", "normalise by running statistics", "training mode", remedy, function="export")
        )
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (x, *vectors))
    wide = torch.float64 if double else torch.float32
    weight, bias, mean, var = (None if tensor is None else _as(wide, tensor) for tensor in vectors)
    y = F.batch_norm(_as(wide, x), mean, var, weight, bias, False, 0.0, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    if mask is not None:
        y = torch.where(mask if mask.ndim == x.ndim else mask.unsqueeze(1), y, 0.0)
    return _as(x.dtype, y)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Without an operator where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
