"""The batch norms of a torch model, recalibrated: what each is given, while nothing else of the model changes."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from cubn._moments import Float64, Moments
from cubn._state.arrays import STATISTICS
from cubn.errors import a_type, message
from cubn.health.recalibration.commit import Target
from cubn.health.recalibration.passes import Observe, Pools, Stage
from cubn.moments import moments
from cubn.state import BatchNormState
from cubn.torch import _batch_norm as cubns
from cubn.torch._models.permitted import at
from cubn.torch._models.uncompiled import uncompiled

Forward = Callable[[Any, Any], Any]

Given = Callable[[str, int, Tensor, Tensor | None], tuple[Moments, Moments]]
"""Hears of the input and mask of a layer's call; gives their moments, and what is known of such inputs so far."""


class Model:
    """A model, whose batch norms are given what its forward makes of a batch."""

    def __init__(self, model: nn.Module, layerwise: bool, forward: Forward | None) -> None:
        if forward is not None and not callable(forward):
            raise TypeError(message("forward", "be a function of the model and a batch", a_type(forward)))
        self._model, self._layerwise, self._forward = _unwrapped(model), layerwise, forward or usual_forward
        self._layers = {
            path: module
            for path, module in self._model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        if not self._layers:
            rule = "have batch norms with running statistics"
            raise ValueError(message("states_or_model", rule, f"{a_type(model)} without"))
        self._calls: Mapping[str, int] = {}  # of each layer in a forward
        self.targets = {path: _target(path, layer) for path, layer in self._layers.items()}
        options = {path: [layer.num_features, layer.eps] for path, layer in self._layers.items()}
        self.identity = {"kind": "model", "layers": options, "layerwise": layerwise}

    def digest(self) -> str:
        """Of parameters and buffers, but for what is recalibrated."""
        digest = hashlib.sha256()
        own = {f"{path}.{name}" if path else name for path in self._layers for name in _OWN}
        for name, tensor in self._model.state_dict().items():
            if name not in own and isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_dense(tensor).reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def stages(self, batches: Iterable[Any]) -> list[Stage]:
        """All layers at once; or one after the other, as the first batch meets them."""
        if not self._layerwise or len(self._layers) == 1:
            return [tuple(self._layers)]
        with self._forwards({}) as run:
            for batch in batches:
                self._calls = run(batch, _of_a_batch)
                break
        return [(path,) for path in self._calls]

    @contextmanager
    def observing(self, stage: Stage, done: Mapping[str, Moments]) -> Iterator[Observe]:
        with self._forwards(done) as run:

            def observe(batch: Any, pools: Pools) -> None:
                samples = _samples(batch) if pools.start else 0

                def given(path: str, call: int, x: Tensor, mask: Tensor | None) -> tuple[Moments, Moments]:
                    if path not in stage:
                        return _of_a_batch(path, call, x, mask)
                    first = pools.start * len(x) // samples if samples else 0
                    found = pools.add(path, call, x.detach(), self._layers[path].num_features, mask=mask, first=first)
                    if call + 1 == self._calls.get(path) and not last:
                        raise _Seen
                    return found

                calls = run(batch, given)
                if self._calls:
                    self._check_calls(calls)

            last = stage[-1:] == tuple(self._calls)[-1:]  # whose forwards go on, to see that there is no more
            yield observe

    def _check_calls(self, calls: Mapping[str, int]) -> None:
        """That nothing was missed: of a call that the first batch does not have no pass is."""
        for path, times in calls.items():
            if times > self._calls.get(path, 0):
                rule = "call each layer as often with the first batch as with any other"
                got = f"{times} calls of {path}, which the first calls {self._calls.get(path, 0)} times"
                remedy = "Begin with a batch that has all calls, or use layerwise=False."
                raise ValueError(message("states_or_model", rule, got, remedy))

    @contextmanager
    def _forwards(self, done: Mapping[str, Moments]) -> Iterator[Callable[[Any, Given], Mapping[str, int]]]:
        """Forwards in eval mode, in which layers that are done have their new statistics, and the others those of each
        batch; they give how often each layer was called. Afterwards all is as it was.
        """
        heard: Given | None = None
        calls = Counter[str]()

        def before(path: str, layer: _BatchNorm, args: Any, kwargs: Any) -> None:
            assert heard is not None
            calls[path] += 1
            if path not in done:
                given, pooled = heard(path, calls[path] - 1, *_inputs(layer, args, kwargs))
                layer._buffers.update(_for_a_batch(given, pooled, old[path]))

        def run(batch: Any, given: Given) -> Mapping[str, int]:
            nonlocal heard
            heard = given
            calls.clear()
            with torch.no_grad(), suppress(_Seen):
                self._forward(self._model, batch)
            return dict(calls)

        old = {path: {name: layer._buffers.get(name) for name in _OWN} for path, layer in self._layers.items()}
        with ExitStack() as afterwards:
            afterwards.enter_context(_random_numbers_kept(self._model))
            afterwards.enter_context(uncompiled())
            for module in self._model.modules():
                afterwards.callback(setattr, module, "training", module.training)
                module.training = False  # not by eval(), which models give meanings of their own
            for path, layer in self._layers.items():
                kept = {name: tensor for name, tensor in old[path].items() if tensor is not None}
                afterwards.callback(layer._buffers.update, kept)
                layer._buffers.update({name: tensor.clone() for name, tensor in kept.items()})
                if isinstance(layer, cubns._BatchNorm):
                    afterwards.callback(setattr, layer, "_ranks", layer._ranks)
                    layer._ranks = None  # whose forwards may be more, or fewer
                if path in done:
                    layer._buffers.update(_tensors(done[path], done[path].var_unbiased(), old[path]))
                hook = layer.register_forward_pre_hook(partial(before, path), with_kwargs=True)
                afterwards.callback(hook.remove)
            yield run


class _Seen(BaseException):
    """A layer was given all that a batch has for it, and the rest of the forward is not needed.

    No Exception, which models may catch.
    """


_OWN = (*STATISTICS, "num_batches_tracked", "skipped")
"""What of a layer a recalibration changes."""


def usual_forward(model: Any, batch: Any) -> Any:
    """With a mapping as keyword arguments, with the first of a list or tuple, or with the batch itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _unwrapped(model: Any) -> Any:
    """What is in a compiled or data-parallel model: its forwards concern no other rank."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            break
    sharding = sys.modules.get("torch.distributed.fsdp")
    kinds = [getattr(sharding, name, None) for name in ("FullyShardedDataParallel", "FSDPModule")]
    for path, module in model.named_modules():
        if any(kind and isinstance(module, kind) for kind in kinds):
            remedy = "Recalibrate a model that has the whole state_dict, before it is sharded."
            raise TypeError(message("states_or_model", "be whole on every rank", f"{a_type(module)}{at(path)}", remedy))
    return model


def _target(path: str, layer: _BatchNorm) -> Target:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None and var is not None
    if is_lazy(mean):
        got = f"{a_type(layer)}{at(path)}, which has no statistics yet"
        raise ValueError(message("states_or_model", "have seen a batch", got, "Call it with a batch first."))
    state = BatchNormState.from_arrays(running_mean=mean, running_var=var, check=False)
    state._check_updatable()

    def set_counters(batches: int) -> None:
        for name, count in (("num_batches_tracked", batches), ("skipped", 0)):
            counter = layer._buffers.get(name)
            if counter is not None:
                counter.fill_(count)

    return Target(state, set_counters)


def _dense(tensor: Tensor) -> Tensor:
    """Its numbers as plain memory on the CPU."""
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return dense.cpu().resolve_conj().resolve_neg().contiguous()


def _samples(batch: Any) -> int:
    """Of a batch: the extent of the first tensor in it."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    rule = "hold a tensor, whose first extent is the number of samples, where start is given"
    raise TypeError(message("a batch", rule, a_type(batch)))


def _inputs(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The x and the mask that a layer is called with."""
    arguments = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    return next(iter(arguments.values())), arguments.get("mask")


def _of_a_batch(path: str, call: int, x: Tensor, mask: Tensor | None) -> tuple[Moments, Moments]:
    """For a layer that is not pooled: no more is known than the batch."""
    taken = moments(x.detach(), mask=mask)
    return taken, taken


def _for_a_batch(given: Moments, pooled: Moments, old: Mapping[str, Tensor | None]) -> Mapping[str, Tensor | None]:
    """By what to normalise a batch: its own statistics, or, where it has a single value per channel and so no variance,
    by what is known of those before.
    """
    if given.count >= 2:
        return _tensors(given, given.var(), old)
    return (
        {name: old[name] for name in STATISTICS} if pooled.count < 2 else _tensors(pooled, pooled.var_unbiased(), old)
    )


def _tensors(of: Moments, var: Float64, like: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Running statistics that make a layer normalise by these."""
    values = dict(zip(STATISTICS, (of.mean, var), strict=True))
    return {
        name: torch.tensor(values[name], dtype=old.dtype, device=old.device)
        for name in STATISTICS
        if (old := like[name]) is not None
    }


def _random_numbers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Every pass draws the same, so that a loader that shuffles by torch's generator gives it the same batches."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    return torch.random.fork_rng([device.index for device in devices], device_type="cuda")
