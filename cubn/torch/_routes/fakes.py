"""What operators return, but for its values: shapes, strides, dtypes and devices, which may be symbols."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cubn._layout import c_strides, is_dense, output_strides
from cubn._types import Statistics
from cubn.torch._routes import as_tensors


def train(x: Tensor, weight: Any, bias: Any, residual: Any, mask: Any, *rest: Any) -> tuple[Tensor, ...]:
    *_, relu, comm = rest
    keeps_bits = residual is not None and relu
    bits = x.new_empty(as_tensors.words(x, mask) if keeps_bits else 0, dtype=torch.int16)
    statistics = x.new_empty(Statistics.size(x.shape[1]), dtype=torch.float64)
    exchange = torch.empty((), dtype=torch.int64, device="cpu") if comm else x.new_empty(0, dtype=torch.int64)
    return _like(x), statistics, bits, exchange


frozen = train


def inference(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, gamma, beta, residual, _, _, _ = rest
    return _like(x), _of_channels(x, gamma), _of_channels(x, beta), _like(x) if residual else x.new_empty(0)


def double_backward(ddx: Any, ddgamma: Any, ddbeta: Any, ddresidual: Any, dy: Any, x: Tensor, *rest: Any) -> Any:
    *_, gamma, _, _, _, _, _ = rest
    return _like(x), _like(x), _of_channels(x, gamma)


def _of_channels(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.new_empty(0) if dtype is None else x.new_empty(x.shape[1], dtype=dtype)


def _like(x: Tensor) -> Tensor:
    shape, strides = tuple(x.shape), x.stride()
    if any(isinstance(number, torch.SymInt) for number in (*shape, *strides)):  # which nothing can be kept of
        strides = strides if is_dense.__wrapped__(shape, strides) else c_strides(shape)
    else:
        strides = output_strides(shape, strides)
    return x.new_empty_strided(shape, strides)
