"""The running statistics of a whole model: put back after calls that are not to count, or updated once for many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cubn._moments import Moments
from cubn.errors import message, reporting_as
from cubn.torch import _passes
from cubn.torch._batch_norm import _BatchNorm
from cubn.torch._models.permitted import check_is_model
from cubn.torch._models.pool import Pool


class Kept:
    """The running statistics and counters of a model as they were."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            (layer, {name: buffer.clone() for name, buffer in _held(layer).items()})
            for layer in model.modules()
            if "running_mean" in layer._buffers
        ]
        pools = (layer._pool for layer in model.modules() if isinstance(layer, _BatchNorm))
        self._pools = [(pool, pool.moments) for pool in pools if pool is not None]

    def release(self) -> None:
        """Let the statistics of now stand: nothing is put back."""
        self._layers.clear()
        self._pools.clear()

    @torch.no_grad()
    def _put_back(self) -> None:
        for layer, kept in self._layers:
            for name, buffer in _held(layer).items():
                if name in kept:
                    buffer.copy_(kept[name])
                else:  # of a lazy layer, made meanwhile
                    buffer.fill_(_BEGIN[name])
        for pool, moments in self._pools:
            pool.moments = moments


_BEGIN = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0, "skipped": 0}
"""The statistics and counters of a layer, and what they are before the first update."""


def _held(layer: nn.Module) -> dict[str, Tensor]:
    buffers = {name: layer._buffers.get(name) for name in _BEGIN}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None and not is_lazy(buffer)}


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[Kept]:
    """Let the forwards in a `with` block leave no trace in a model's running statistics.

    At its exit running_mean, running_var, num_batches_tracked and skipped of every layer are, to the bit, what they
    were at its entry. A layer updates them once for each training forward, except for those inside a backward pass,
    which activation checkpointing makes and which repeat another. It cannot know that a call is a warm-up, or that a
    step will be taken again; this is for those.

    Parameters
    ----------
    model : torch.nn.Module
        Its batch norms may be cubn's, torch's own or others: what counts are the names of the buffers. Wrapped by DDP,
        FSDP or `torch.compile`, too.

    Yields
    ------
    Kept
        Its `release()` lets the new statistics stand, where the block finds out that its forwards do count.

    Notes
    -----
    The statistics are copied at the entry, and copied back in place at the exit, also of an exception; nothing waits
    for a device. Blocks may be nested; inside `accumulate`, forwards leave no trace in what it pools. A layer that got
    other buffers meanwhile (`half()`, `to_empty()`) has the old values in the new ones; a lazy layer that was
    initialised meanwhile is as new. A backward through torch's own batch norms must be in the block: torch takes what
    is put back for a change of what backward needs.

    Examples
    --------
    A warm-up, as before the capture of a CUDA graph:

    >>> import torch, cubn.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), cubn.torch.BatchNorm1d(4))
    >>> with cubn.torch.keep_statistics(model):
    ...     _ = model(torch.randn(8, 3))
    >>> model[1].num_batches_tracked.item()
    0

    A step that is taken again, because its gradients overflowed, is counted once:

    >>> optimizer = torch.optim.SGD(model.parameters())
    >>> scaler = torch.amp.GradScaler("cpu")
    >>> x, done = torch.randn(8, 3), False
    >>> while not done:
    ...     with cubn.torch.keep_statistics(model) as kept:
    ...         optimizer.zero_grad()
    ...         scaler.scale(model(x).square().mean()).backward()
    ...         scaler.step(optimizer)
    ...         scale = scaler.get_scale()
    ...         scaler.update()
    ...         if done := scaler.get_scale() >= scale:
    ...             kept.release()
    >>> model[1].num_batches_tracked.item()
    1
    """
    with reporting_as("keep_statistics"):
        check_is_model(model)
    kept = Kept(model)
    try:
        yield kept
    finally:
        kept._put_back()


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Update a model's running statistics once for all the forwards in a `with` block.

    Each training forward normalises by its own micro-batch and updates nothing. At the exit each layer makes one update
    by the Moments of all its inputs: to the bit that of `cubn.update` by `cubn.moments` of its inputs concatenated,
    wherever they were cut. num_batches_tracked moves by one. With a momentum of 1, a block over a data set leaves the
    statistics of the data set.

    Parameters
    ----------
    model : torch.nn.Module
        With batch norms of `cubn.torch`. Those in eval mode or frozen, and others than cubn's, do what they always do.

    Raises
    ------
    ValueError
        If model has no batch norm of cubn's with running statistics, or one of them is in such a block already.

    Notes
    -----
    An exception in the block, or in an update, leaves the running statistics of all layers as they were. What
    activation checkpointing computes again is not counted a second time; what a mask leaves out is not counted.

    The price is one more read of each layer's input, and on a device a wait for its Moments, which are on the host;
    these are about 2 log2(samples) nodes of 16 bytes per channel.

    What is exact: the pooling. What a layer gets as input is what the layers before it made of that micro-batch alone,
    and so are its y and gradients; of a layer behind another batch norm the inputs differ from those of one large
    batch. With `comm=`, Moments are of the micro-batches of all ranks, in the order of micro-batches and then of ranks;
    every rank makes as many forwards, each with one more exchange.

    A forward compiled by `torch.compile` is compiled anew for such a block, and broken at each batch norm, where
    `fullgraph=True` is an error.

    Examples
    --------
    >>> import numpy as np, torch, cubn, cubn.torch
    >>> bn = cubn.torch.BatchNorm1d(4)
    >>> x = torch.randn(12, 4)
    >>> with cubn.torch.accumulate(bn):
    ...     for micro_batch in x.split([2, 7, 3]):
    ...         bn(micro_batch).sum().backward()
    >>> state = cubn.BatchNormState(4)
    >>> cubn.update(state, cubn.moments(x))
    >>> np.array_equal(bn.running_var, state.running_var), bn.num_batches_tracked.item()
    (True, 1)
    """
    with reporting_as("accumulate"):
        check_is_model(model)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    if not layers:
        remedy = "Call cubn.torch.convert first."
        rule = "have batch norms of cubn.torch with running statistics"
        raise ValueError(message("model", rule, type(model).__name__, remedy, function="accumulate"))
    if any(layer._pool is not None for layer in layers):
        remedy = "Leave out the inner block."
        raise ValueError(
            message("model", "not be in such a block already", "one in another", remedy, function="accumulate")
        )
    pools = [(layer, Pool()) for layer in layers]
    for layer, pool in pools:
        layer._pool = pool
    try:
        yield
    finally:
        for layer in layers:
            layer._pool = None
    with keep_statistics(model) as kept:
        for layer, pool in pools:
            if pool.moments is not None:
                _update(layer, pool.moments)
        kept.release()


def _update(layer: _BatchNorm, moments: Moments) -> None:
    mean = layer.running_mean
    assert mean is not None
    _passes.update((None, None, mean, layer.running_var), layer._counters(mean), moments, momentum=layer.momentum)
