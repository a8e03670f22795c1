"""The train/eval gap of a PyTorch model: run with each of its batch norms using one statistics or the other."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from cubn._state.arrays import STATISTICS
from cubn.errors import a_type, message
from cubn.health.gap import LayerGap, Squares, TrainEvalGap, ranked, squares
from cubn.torch._health.sources import has_statistics
from cubn.torch._models.replay import cuda_devices, unchanged

Loss = Callable[[Any, Any], Any]


class _Batch(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    samples: int


@torch.no_grad()
def of_model(model: nn.Module, given: Sequence[Any], loss: Loss | None, contributions: bool) -> TrainEvalGap:
    """What `cubn.health.train_eval_gap` does with a model."""
    model = getattr(model, "_orig_mod", model)  # compiled: its hooks are those of when it was
    layers = {
        path or type(model).__name__: module
        for path, module in model.named_modules()
        if has_statistics(module) and not getattr(module, "frozen", False)
    }
    if not layers:
        raise ValueError(message("subject", "have batch norms with running statistics", type(model).__name__))
    if lazy := [name for name, module in layers.items() if is_lazy(module.running_mean)]:
        raise ValueError(message("subject", "have all its buffers", f"a lazy {lazy[0]}", "Call it once before."))
    batches = [_batch(batch, loss is not None) for batch in given]
    with _examined(model, layers) as run:
        compare = _Comparison(run, batches, loss)
        everything = frozenset(layers)
        reference = compare.reference(everything)
        total = compare(frozenset())
        gaps = []
        for name in [name for name in layers if name in run.seen]:  # others the model did not call
            found = {}
            if contributions:
                found = {"alone": compare(everything - {name}), "remaining": compare(frozenset({name}))}
            gaps.append(LayerGap.of(name, reference[name], **found))
    losses = None if loss is None else (compare.loss, compare.loss + total)
    return TrainEvalGap(ranked(gaps), "output" if loss is None else "loss", total, losses)


class _Run:
    """Runs of a model in which some layers use the statistics of their input, which they are lent as running ones."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.layers = layers
        self.names = {module: name for name, module in layers.items()}
        self.by_batch: Collection[str] = ()
        self.seen: dict[str, list[tuple[float, Squares]]] = defaultdict(list)
        self.recording = False
        self.own = {name: [module._buffers[key] for key in STATISTICS] for name, module in layers.items()}
        self.devices = cuda_devices([*model.parameters(), *model.buffers()])

    def __call__(self, batch: _Batch, by_batch: Collection[str]) -> Any:
        self.by_batch = by_batch
        with unchanged(self.model, self.devices):
            return self.model(*batch.args, **batch.kwargs)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook."""
        name = self.names[module]
        if name not in self.by_batch:
            return
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        values = _values(next(iter(arguments.values())), arguments.get("mask"))
        var, mean = torch.var_mean(values, 1, correction=0)
        buffers = module._buffers
        if self.recording:
            self.seen[name].append((float(values.shape[1]), _squares(module, self.own[name], (mean, var))))
        for key, value in zip(STATISTICS, (mean, var), strict=True):
            buffers[key] = value.to(buffers[key].dtype)  # type: ignore[union-attr]


@contextmanager
def _examined(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[_Run]:
    """A model in eval mode, whose layers are heard; afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    run = _Run(model, layers)
    random_numbers = torch.get_rng_state()
    hooks: list[Any] = []

    def put_back() -> None:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
        for name, module in layers.items():
            module._buffers.update(zip(STATISTICS, run.own[name], strict=True))
        torch.set_rng_state(random_numbers)

    try:
        model.eval()
        for layer in layers.values():
            hooks.append(layer.register_forward_pre_hook(run.before, with_kwargs=True))
        yield run
    finally:
        try:
            put_back()
        finally:  # Ctrl-C may have come amid that, or amid what each run puts back
            put_back()


class _Comparison:
    """Outputs, or losses, of a model beside those by batch statistics alone."""

    def __init__(self, run: _Run, batches: Sequence[_Batch], loss: Loss | None) -> None:
        self.run, self.batches, self._loss = run, batches, loss
        self.outputs: list[Any] = []
        self.loss = math.nan

    def reference(self, everything: Collection[str]) -> Mapping[str, list[tuple[float, Squares]]]:
        """Run by batch statistics alone; what each layer did."""
        self.run.recording = True
        self.outputs = [self.run(batch, everything) for batch in self.batches]
        self.run.recording = False
        if self._loss is not None:
            self.loss = self._mean_loss(self.outputs)
        return self.run.seen

    def __call__(self, by_batch: Collection[str]) -> float:
        """How far it is off when only these layers use batch statistics."""
        outputs = [self.run(batch, by_batch) for batch in self.batches]
        if self._loss is not None:
            return _known(self._mean_loss(outputs) - self.loss)
        off = size = 0.0
        for output, expected in zip(outputs, self.outputs, strict=True):
            for one, other in zip(_floats(output), _floats(expected), strict=True):
                off += float((one.double() - other.double()).square().sum())
                size += float(other.double().square().sum())
        return _known(math.sqrt(off / size) if size else math.sqrt(off))

    def _mean_loss(self, outputs: Sequence[Any]) -> float:
        assert self._loss is not None
        losses = [float(self._loss(y, batch.target)) for y, batch in zip(outputs, self.batches, strict=True)]
        return float(np.average(losses, weights=[batch.samples for batch in self.batches]))


def _known(value: float) -> float:
    """NaN is as far off as can be."""
    return math.inf if math.isnan(value) else value


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _values(x: Tensor, mask: Tensor | None) -> Tensor:
    """Those of each channel, in float64."""
    values = x.detach().movedim(1, 0)
    if mask is not None:
        where = mask.movedim(1, 0)[0] if mask.ndim == x.ndim else mask
        return values[:, where.expand(values.shape[1:])].double()
    return values.flatten(1).double()


def _squares(module: nn.Module, own: Sequence[Tensor | None], batch: Sequence[Tensor]) -> Squares:
    gamma, beta = (
        default if parameter is None else _numbers(parameter)
        for parameter, default in ((module._parameters.get("weight"), 1.0), (module._parameters.get("bias"), 0.0))
    )
    eps = float(getattr(module, "eps", 1e-5))
    running, lent = ((_numbers(mean), _numbers(var)) for mean, var in (own, batch))
    return squares(lent, running, gamma, beta, eps)


def _numbers(tensor: Tensor | None) -> Any:
    assert tensor is not None
    return tensor.detach().cpu().double().numpy()


def _batch(given: Any, with_target: bool) -> _Batch:
    """The model's arguments, and the target for the loss."""
    if with_target and not (isinstance(given, (tuple, list)) and len(given) == 2):
        rule = "be pairs of an input and a target, for a loss"
        raise TypeError(message("batches", rule, a_type(given)))
    x, target = given if with_target else (given, None)
    args = () if isinstance(x, Mapping) else tuple(x[:1]) if isinstance(x, (tuple, list)) else (x,)
    kwargs = dict(x) if isinstance(x, Mapping) else {}
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        rule = "be tensors, tuples or lists that begin with one, or mappings of keyword arguments"
        raise TypeError(message("batches", rule, a_type(given)))
    return _Batch(args, kwargs, target, len(tensors[0]))
