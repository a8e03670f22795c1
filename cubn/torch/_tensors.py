"""What a forward leaves for its backward, as tensors alone: what operators return, and are given again."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cubn import _calls
from cubn._arrays.library import ALIGNMENT
from cubn._inputs import bind, relu_gradient
from cubn._layout import output_strides
from cubn._types import ROWS, Statistics
from cubn.backends.protocol import ReluMask
from cubn.saved import Layouts
from cubn.sync.collective import SyncContext
from cubn.torch import _backend_arrays, _communicators, _passes, _relu_mask
from cubn.torch._passes import Left

Kept = tuple[Tensor, Tensor, Tensor]
"""`statistics`, the float64 block of `cubn._types.Statistics`; `bits`, the relu mask as so many int16 numbers as `words`
says, none where nothing is kept; `exchange`, an int64 scalar on the host, the number of the forward's exchange.
"""


class Kind(NamedTuple):
    """Of a forward, as far as its backward has to know."""

    gamma: torch.dtype | None
    beta: torch.dtype | None
    residual: bool
    relu: bool
    frozen: bool


def words(x: Tensor, mask: Tensor | None) -> Any:
    """Of bits: as many as there may be. Kernels choose between words along channels and along positions by layouts."""
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    along_channels = N * S * -(-C // 16)
    if x.ndim == 2 and mask is None and x.is_contiguous():
        return along_channels
    return torch.sym_max(N * C * -(-S // 16), along_channels)  # type: ignore[no-untyped-call]


def plain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """x and a residual from whose layouts alone it follows how kernels choose: the residual's is that of y, and both
    begin where vectors can be read. The same values; copies where they have to be.
    """
    strides = output_strides(tuple(x.shape), x.stride())
    if residual.stride() != strides:
        residual = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(residual)
    if x.is_cuda:
        x, residual = (a.clone() if a.data_ptr() % ALIGNMENT else a for a in (x, residual))
    return x, residual


def to_tensors(x: Tensor, mask: Tensor | None, left: Left, relu_mask: ReluMask | None) -> Kept:
    bits, of = _relu_mask.as_tensor(relu_mask)
    if bits is None:
        bits = x.new_empty(0, dtype=torch.int16)
    else:
        _orders[_order(x, mask, left.frozen)] = of
        bits = _filled_up(bits, words(x, mask))
    number = left.context.exchange if left.context else 0
    return _defined(left), bits, torch.tensor(number)


def _defined(left: Left) -> Tensor:
    """The statistics, and 0 where nothing was written: operators are compared by all that they return."""
    memory, _, C, gamma, beta = left.statistics
    block = _backend_arrays.as_tensor(memory)
    return torch.where(_written(C, gamma, beta, left.frozen, block.device), block, 0.0)


@lru_cache(256)
def _written(C: int, gamma: bool, beta: bool, frozen: bool, device: torch.device) -> Tensor:
    """Which numbers of the statistics have a meaning."""
    rows = dict.fromkeys(ROWS, True) | {"m2": not frozen, "gamma": gamma, "beta": beta}
    written = torch.zeros(Statistics.size(C), dtype=torch.bool)
    written[0] = True
    for name, is_there in rows.items():
        begin = Statistics.offset(name, C)
        written[begin : begin + C] = is_there
    return written.to(device)


def from_tensors(x: Tensor, mask: Tensor | None, kept: Kept, kind: Kind, comm: int) -> tuple[Left, ReluMask | None]:
    """x and the mask are those of the forward."""
    statistics, bits, exchange = kept
    found = _calls.look_up(_LEFT, (x, mask), *kind)
    left = _left(x, mask, kind) if found is None else found[0].left
    memory = _backend_arrays.from_tensor(statistics)
    of = left.statistics._replace(memory=memory, address=statistics.data_ptr())
    context = SyncContext(_communicators.of(comm), None, int(exchange)) if comm else None
    relu_mask = None
    if kind.residual and kind.relu:
        relu_mask = _relu_mask.as_relu_mask(bits, _orders[_order(x, mask, kind.frozen)])
    return left._replace(statistics=of, context=context), relu_mask


# --- what follows from layouts ----------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    left: Left
    nbytes: int = 0  # besides what is counted for every entry


_LEFT: Any = _calls.new_store()


def _left(x: Tensor, mask: Tensor | None, kind: Kind) -> Left:
    """What a forward with such arguments leaves, but for its statistics."""
    C = x.shape[1]
    gamma, beta = (dtype and x.new_empty(C, dtype=dtype) for dtype in (kind.gamma, kind.beta))
    inputs = bind(x, _passes.new_state(x, (gamma, beta, None, None), 1.0), mask, None)
    layouts = Layouts.of(
        inputs._replace(residual_or_dy=inputs.x if kind.residual else None), relu_gradient(kind.relu, kind.residual)
    )
    statistics = Statistics(None, 0, C, gamma is not None, beta is not None)
    left = Left(layouts, _passes.without_memory(inputs.held), statistics, kind.frozen, None)
    _calls.add(_LEFT, _Kept(left), (inputs.x, inputs.mask), *kind)
    return left


_orders: dict[tuple[Any, ...], Any] = {}  # how bits are packed: for each layout that there was, as it never changes


def _order(x: Tensor, mask: Tensor | None, frozen: bool) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device, mask is None, frozen


def _filled_up(bits: Tensor, words: int) -> Tensor:
    """Bits, and as much behind them as is missing."""
    if bits.dtype == torch.int16 and bits.numel() == words:
        return bits.reshape(-1)
    filled = bits.new_zeros(words, dtype=torch.int16)
    filled.view(torch.uint8)[: bits.nbytes].copy_(bits.reshape(-1).view(torch.uint8))
    return filled
