"""Where a monitor reads: the batch norms of a PyTorch model, all in one copy that is not waited for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cubn._state.arrays import STATISTICS
from cubn.errors import message
from cubn.health.reading import Reading, Watched

PLAIN = (Tensor, nn.Parameter)
"""What is read as it is. A sharded parameter is not: that takes all ranks."""


class ModuleSource:
    """The modules that hold running statistics, a shared one once; their buffers are looked up at each reading."""

    def __init__(self, model: nn.Module) -> None:
        found = {path: module for path, module in model.named_modules() if has_statistics(module)}
        if not found:
            raise ValueError(message("subject", "have batch norms with running statistics", type(model).__name__))
        for path, module in found.items():
            if is_lazy(module.running_mean):
                raise ValueError(message("subject", "have all its buffers", f"a lazy {path}", "Call it once before."))
        self._modules = tuple(found.values())
        self._sizes = [module._buffers["running_mean"].numel() for module in self._modules]
        self.layers = tuple(
            Watched(path or type(model).__name__, size, getattr(module, "eps", 1e-5))
            for (path, module), size in zip(found.items(), self._sizes, strict=True)
        )
        wide = any(module._buffers["running_mean"].dtype == torch.float64 for module in self._modules)
        self._torch_dtype = torch.float64 if wide else torch.float32
        self.dtype = np.dtype(np.float64 if wide else np.float32)
        self._momenta: list[float | None] = []
        self._momentum = np.empty(0)
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._readings = 0
        self._count_skipped = any("skipped" in module._buffers for module in self._modules)

    @torch.no_grad()
    def read(self) -> Transfer:
        self._readings += 1
        gammas, means, variances, tracked = [], [], [], []
        for module, size in zip(self._modules, self._sizes, strict=True):
            buffers, weight = module._buffers, module._parameters.get("weight")
            mean, counter = buffers["running_mean"], buffers.get("num_batches_tracked")
            if mean is None or mean.numel() != size:
                rule = "keep its batch norms as they are while it is watched"
                got = "no running_mean" if mean is None else f"{mean.numel()} channels instead of {size}"
                raise ValueError(message("subject", rule, got, "Make a new Monitor.", function="step"))
            if type(weight) not in PLAIN:
                weight = self._constant(1.0 if weight is None else math.nan, size, mean)
            if counter is None:  # taken to be updated in each reading
                counter = torch.full_like(mean[0], self._readings, dtype=torch.int64)
            gammas.append(weight)
            means.append(mean)
            variances.append(buffers["running_var"])
            tracked.append(counter)
        values = torch.cat(_together([*gammas, *means, *variances])).to(self._torch_dtype)
        counts = torch.cat((torch.stack(_together(tracked)), *_together(self._skipped())))
        return Transfer(values, counts, self._sizes, self._weights())

    def _skipped(self) -> list[Tensor]:
        """Batches skipped by channel, of all layers if any counts them."""
        if not self._count_skipped:
            return []
        skipped = []
        for module, size in zip(self._modules, self._sizes, strict=True):
            skips, mean = module._buffers.get("skipped"), module._buffers["running_mean"]
            skipped.append(self._constant(0, size, mean, torch.int64) if skips is None else skips)
        return skipped

    def _constant(self, value: float, size: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        key = value if value == value else None, size, like.device, dtype or like.dtype
        if key not in self._constants:
            self._constants[key] = torch.full((size,), value, device=like.device, dtype=dtype or like.dtype)
        return self._constants[key]

    def _weights(self) -> NDArray[np.float64]:
        """Each channel's momentum; NaN for the cumulative average."""
        momenta = [getattr(module, "momentum", None) for module in self._modules]
        if momenta != self._momenta:
            each = [np.nan if momentum is None else momentum for momentum in momenta]
            self._momenta, self._momentum = momenta, np.repeat(each, self._sizes)
        return self._momentum


def has_statistics(module: nn.Module) -> bool:
    """Whether it is a batch norm with running statistics, of whatever package."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return all(module._buffers.get(name) is not None for name in STATISTICS)


def _together(tensors: list[Tensor]) -> list[Tensor]:
    """On one device; those of several meet on the host, which waits for them."""
    return tensors if len({tensor.device for tensor in tensors}) < 2 else [tensor.cpu() for tensor in tensors]


class Transfer:
    """A reading on its way to the host: from a CUDA device into pinned memory, behind what its stream has to do."""

    def __init__(self, values: Tensor, counts: Tensor, sizes: list[int], momentum: NDArray[np.float64]) -> None:
        self._sizes, self._momentum = sizes, momentum
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            stream = torch.cuda.current_stream(values.device)
            values, counts = _pinned(values), _pinned(counts)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)
        self._values, self._counts = values, counts

    def ready(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def result(self) -> Reading:
        if self._event is not None:
            self._event.synchronize()
        values, counts = self._values.cpu().numpy().reshape(3, -1), self._counts.cpu().numpy()
        layers = len(self._sizes)
        both = np.zeros((2, values.shape[1]), np.int64)
        both[0] = np.repeat(counts[:layers], self._sizes)
        both[1] = counts[layers:] if len(counts) > layers else 0
        return Reading(values, both, self._momentum)


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
