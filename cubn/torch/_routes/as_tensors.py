"""What a forward leaves for its backward, as tensors alone: what operators return, and are given again."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cubn import _calls
from cubn._arrays.library import ALIGNMENT
from cubn._calls import new_tuple
from cubn._inputs import bind, relu_gradient
from cubn._kept import Store
from cubn._layout import output_strides
from cubn._state.arrays import StateArrays
from cubn._types import ROWS, Statistics
from cubn.backends import threads
from cubn.backends.protocol import ReluMask
from cubn.errors import message
from cubn.saved import Layouts
from cubn.sync.collective import SyncContext
from cubn.torch._passes import backend_arrays
from cubn.torch._passes import relu_mask as relu_masks
from cubn.torch._passes.arguments import Left, new_state, without_memory
from cubn.torch._passes.reading import read
from cubn.torch._routes import communicators

Kept = tuple[Tensor, Tensor, Tensor]
"""`statistics`, the float64 block of `cubn._types.Statistics`; `bits`, the relu mask as int16 numbers, `words` of them;
`exchange`, the number of the forward's exchange, an int64 scalar on the host. Bits and exchange may be empty.
"""
KeptOrNone = tuple[Tensor, Tensor | None, Tensor | None]
"""With None for what is empty."""


Kind = tuple[torch.dtype | None, torch.dtype | None, bool, bool, bool]
"""Of a forward, as far as its backward has to know: gamma's and beta's dtype, residual, relu, frozen."""


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
    statistics, context = left.statistics, left.context
    memory, _, C, gamma, beta, _ = statistics
    block = backend_arrays.as_tensor(memory)
    if not block.is_cpu:  # where memory is not zeroed; operators are compared by all of it
        block.masked_fill_(_unwritten(C, gamma, beta, left.frozen, block.device), 0.0)
    if relu_mask is None:
        bits = x.new_empty(0, dtype=torch.int16)
    else:
        bits, of = relu_masks.as_tensor(relu_mask)
        _orders[_order(x, mask, left.frozen)] = of
        bits = _filled_up(bits, words(x, mask))
    return (
        block,
        bits,
        x.new_empty(0, dtype=torch.int64) if context is None else torch.tensor(context.exchange, device="cpu"),
    )


def from_tensors(
    x: Tensor, mask: Tensor | None, kept: KeptOrNone, kind: Kind, comm: int
) -> tuple[Left, ReluMask | None]:
    """x and the mask are those of the forward."""
    block, bits, exchange = kept
    gamma, beta, _, _, frozen = kind
    found = read(x, mask)
    template = None if found is None else _TEMPLATES.get((found[0], threads.limit, kind))
    layouts, held, _ = template or _template(x.detach(), mask, kind)
    block = block.detach().contiguous()
    if block.dtype != torch.float64 or block.shape != (Statistics.size(layouts.extents.C),):
        got, remedy = f"{block.dtype} {tuple(block.shape)}", "Hooks on saved tensors must leave shape and dtype."
        raise ValueError(message("statistics", "be as the forward left them", got, remedy, function="backward"))
    memory = backend_arrays.from_tensor(block)
    parts = memory, block.data_ptr(), layouts.extents.C, gamma is not None, beta is not None, None
    context = None if exchange is None else SyncContext(communicators.of(comm), None, int(exchange))
    relu_mask = None
    if bits is not None:
        order = _orders.get(_order(x, mask, frozen))
        if order is None:
            remedy = "Hooks on saved tensors must leave it where a graph is compiled."
            got = f"strides {x.stride()}"
            raise ValueError(message("x", "have the layout of the forward", got, remedy, function="backward"))
        relu_mask = relu_masks.as_relu_mask(bits, order)
    return new_tuple(Left, (layouts, held, new_tuple(Statistics, parts), frozen, context)), relu_mask


def _unwritten(C: int, gamma: bool, beta: bool, frozen: bool, device: torch.device) -> Tensor:
    """Which numbers of the statistics have no meaning; one for all streams and graphs, so it never goes."""
    kind = C, gamma, beta, frozen, device
    found = _UNWRITTEN.get(kind)
    if found is None:
        found = _new_unwritten(*kind)
        if not torch.cuda.is_current_stream_capturing():  # else it is the graph's
            torch.cuda.current_stream(device).synchronize()
            _UNWRITTEN[kind] = found
    return found


_UNWRITTEN: dict[tuple[int, bool, bool, bool, torch.device], Tensor] = {}


def _new_unwritten(C: int, gamma: bool, beta: bool, frozen: bool, device: torch.device) -> Tensor:
    rows = dict.fromkeys(ROWS, True) | {"m2": not frozen, "gamma": gamma, "beta": beta}
    unwritten = torch.ones(Statistics.size(C), dtype=torch.bool, device=device)
    unwritten[0] = False
    for name, is_there in rows.items():
        begin = Statistics.offset(name, C)
        unwritten[begin : begin + C] = not is_there
    return unwritten


# --- what follows from layouts ----------------------------------------------------------------------------------------


class _Template(NamedTuple):
    """What a forward leaves that follows from layouts."""

    layouts: Layouts
    held: StateArrays
    nbytes: int = 0  # besides what is counted for every entry


_TEMPLATES: Store[_Template] = _calls.new_store()


def _template(x: Tensor, mask: Tensor | None, kind: Kind) -> _Template:
    """Of a forward with such arguments."""
    *dtypes, has_residual, relu, _ = kind
    gamma, beta = (None if dtype is None else x.new_empty(x.shape[1], dtype=dtype) for dtype in dtypes)
    inputs = bind(x, new_state(x, (gamma, beta, None, None), 1.0), mask, None)
    residual = inputs.x if has_residual else None  # of any
    layouts = Layouts.of(inputs._replace(residual_or_dy=residual), relu_gradient(relu, has_residual))
    template = _Template(layouts, without_memory(inputs.held))
    if (found := read(x, mask)) is not None:
        _TEMPLATES.add((found[0], threads.limit, kind), template)
    return template


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
