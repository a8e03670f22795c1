"""Batch norm by torch's own operators, for programs that are to run without cubn: in another process, in ONNX."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from cubn.errors import message
from cubn.torch._passes import Vectors

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_dynamo_compiling)  # newer than torch 2.6


def exporting() -> bool:
    """Whether torch.export, or torch.onnx by way of it, or torch.jit.trace is at work."""
    return _is_exporting() or torch._C._is_tracing()


def batch_norm(
    x: Tensor,
    vectors: Vectors,
    training: bool,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """y by the running statistics, as `cubn.torch._normalize` says, but for its bits: torch rounds as it does."""
    if training:
        remedy = "Call model.eval(); to export a training step, restore() the model first: torch's own modules train then."
        raise RuntimeError(message("model", "normalise by running statistics", "training mode", remedy, function="export"))
    given = [tensor for tensor in (x, *vectors) if tensor is not None]
    wide = functools.reduce(torch.promote_types, (tensor.dtype for tensor in given), torch.float32)
    weight, bias, mean, var = (None if tensor is None else tensor.to(wide) for tensor in vectors)
    y = F.batch_norm(x.to(wide), mean, var, weight, bias, False, 0.0, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    if mask is not None:
        y = torch.where(mask if mask.ndim == x.ndim else mask.unsqueeze(1), y, 0.0)
    return y.to(x.dtype)
