"""What all of cubn's modules are: torch's own batch norm, computed by cubn."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.parameter import is_lazy
from torch.types import Device

from cubn._state.arrays import STATISTICS
from cubn.errors import a_type, message
from cubn.sync import Comm, check_comm
from cubn.torch._models.pool import Pool
from cubn.torch._models.replacing import NotToBeReplaced
from cubn.torch._passes.counters import Counters, fits
from cubn.torch._passes.refusals import heard_by
from cubn.torch._routes.normalize import normalize

NARROW = (torch.float16, torch.bfloat16)
"""Dtypes in which a running variance stalls at small momenta."""


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Torch's constructor, attributes and state_dict; and `comm`, `frozen` and `skipped`.

    What `forward` updates are the module's buffers, looked up anew in each call: nothing is kept beside them that could
    go stale when they are converted, moved, loaded or replaced.
    """

    _fused_relu = False  # whether a ReLU is part of it, and
    _fused_residual = False  # a residual, which is added before it

    skipped: Tensor | None
    frozen = False
    _ranks: _Ranks | None = None
    _pool: Pool | None = None  # inside `accumulate`
    qconfig = NotToBeReplaced()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        comm: Comm | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # a keyword that older versions of torch do not know
            self.register_parameter("bias", None)
        self.register_buffer("skipped", None, persistent=False)
        self.comm = comm
        self._widen_statistics()
        self._forget_skipped()

    @property
    def comm(self) -> Comm | None:
        """The ranks over which it trains: shared by copies of the module, not to be pickled."""
        return None if self._ranks is None else self._ranks.comm

    @comm.setter
    def comm(self, comm: Comm | None) -> None:
        check_comm(comm)
        self._ranks = None if comm is None else _Ranks(comm)

    if TYPE_CHECKING:  # torch says that a module takes and returns anything

        def __call__(self, input: Tensor, mask: Tensor | None = None) -> Tensor: ...

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._normalize(input, None, mask)

    def _normalize(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        if isinstance(x, Proxy):
            return self._traced(x, residual, mask)
        try:
            self._check_input_dim(x)  # type: ignore[no-untyped-call]
        except ValueError:
            with heard_by(self.comm if self.training and not self.frozen else None):
                raise
        buffers = self._buffers  # as attributes they take ten times as long
        mean, var = buffers["running_mean"], buffers["running_var"]
        training = (self.training and not self.frozen) or (mean is None and var is None)
        comm = counters = pool = None
        if training:
            comm = self.comm
            if not self.track_running_stats:  # any more: the statistics stay as they are
                mean = var = None
            if mean is not None:
                pool, counters = self._pool, self._counters(mean)
        if pool is not None:
            mean = var = counters = None
        y = normalize(
            x,
            (self.weight, self.bias, mean, var),
            counters,
            training=training,
            momentum=self.momentum,
            eps=self.eps,
            mask=mask,
            residual=residual,
            relu=self._fused_relu,
            comm=comm,
        )
        if pool is not None:
            pool.add(x, mask, comm)
        return y

    def _counters(self, mean: Tensor) -> Counters | None:
        """The counters; kernels write them, so those that do not fit the running statistics, which somebody may have
        replaced, are mended.
        """
        tracked, skipped = self._buffers["num_batches_tracked"], self._buffers["skipped"]
        if tracked is None:
            return None
        if not fits(tracked, 1, mean):
            self.num_batches_tracked = tracked = tracked.to(mean.device, torch.int64)
        if skipped is None or not fits(skipped, mean.numel(), mean):
            self._forget_skipped()
            skipped = self.skipped
            assert skipped is not None
        return Counters(tracked, skipped)

    def _traced(self, x: Proxy, residual: Tensor | None, mask: Tensor | None) -> Any:
        """In a graph of torch.fx, whose tracers look into all modules but torch's: one call of this module."""
        if "forward" in vars(self) or not type(self).forward.__module__.startswith("cubn.torch."):
            remedy = "Trace with a Tracer whose is_leaf_module is true of it."
            got = f"the own forward of {a_type(self)}"
            raise TypeError(message("model", "call batch norms whole", got, remedy, function="torch.fx"))
        tensors = (x, residual) if self._fused_residual else (x,)
        path = x.tracer.path_of_module(self)  # type: ignore[attr-defined]
        return x.tracer.create_proxy("call_module", path, tensors if mask is None else (*tensors, mask), {})

    def freeze(self) -> Self:
        """Take the running statistics as constants also in training, with gradients through; weight and bias go on
        learning.

        Not part of the state_dict. Returns the module, as `requires_grad_` does.
        """
        if not self.track_running_stats:
            remedy = "Make it with track_running_stats=True."
            raise ValueError(message(type(self).__name__, "have running statistics", "none", remedy, function="freeze"))
        self.frozen = True
        return self

    def unfreeze(self) -> Self:
        """Train by the statistics of batches again. Returns the module."""
        self.frozen = False
        return self

    def reset_parameters(self) -> None:
        """weight 1, bias 0; and `reset_running_stats`."""
        self.reset_running_stats()
        for vector, value in (self.weight, 1), (self.bias, 0):
            if vector is not None:
                nn.init.constant_(vector, value)

    def reset_running_stats(self) -> None:
        """running_mean 0, running_var 1, and no batches tracked or skipped."""
        super().reset_running_stats()
        self._forget_skipped()

    def __prepare_scriptable__(self) -> NoReturn:  # which torch.jit.script asks for
        remedy = "Pass an example to torch.jit.trace or torch.export.export, or restore() a copy of the model."
        raise TypeError(message("model", "hold modules of torch's", a_type(self), remedy, function="torch.jit.script"))

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]  # type: ignore[no-untyped-call]
        if self.comm is not None:
            parts.append(f"comm={type(self.comm).__name__}")
        if self.frozen:
            parts.append("frozen=True")
        return ", ".join(parts)

    def _forget_skipped(self) -> None:
        """No updates were skipped in what the running statistics are now, as far as is known."""
        mean, skipped = self.running_mean, self._buffers.get("skipped")
        if "skipped" not in self._buffers or mean is None or is_lazy(mean):
            return  # torch's constructor is still at work, or the channels are still to be counted
        if skipped is None or is_lazy(skipped) or not fits(skipped, mean.numel(), mean):
            self.skipped = torch.zeros(mean.shape, dtype=torch.int64, device=mean.device)
        else:
            skipped.zero_()

    # --- conversions and loading --------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `half`, `to`, `type`, `to_empty` and the like do to each tensor. The running statistics do not become
        narrow, and counters remain whole numbers.
        """
        statistics = [self._buffers[name] for name in STATISTICS]
        counters = [self._buffers[name] for name in Counters._fields]
        spared = []

        def apply(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype == tensor.dtype:
                return applied
            if any(tensor is counter for counter in counters):
                return tensor.to(applied.device)
            if applied.dtype in NARROW and any(tensor is each for each in statistics):
                spared.append(tensor)
                return tensor.to(applied.device, torch.float32)
            return applied

        came_to_be = self.skipped is not None and self.skipped.is_meta
        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        if came_to_be:  # in memory that holds anything, and that no state_dict will fill
            self._forget_skipped()
        if spared:
            _say_that_statistics_stay_wide()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        if f"{prefix}running_mean" in state_dict:
            self._widen_statistics()
            self._forget_skipped()

    def _widen_statistics(self) -> None:
        """Those that were made, or assigned from a state_dict, in 16 bits."""
        narrow = {name: t for name in STATISTICS if (t := self._buffers[name]) is not None and t.dtype in NARROW}
        for name, tensor in narrow.items():
            self._buffers[name] = tensor.to(dtype=torch.float32)
        if narrow:
            _say_that_statistics_stay_wide()


class _Ranks:
    """A communicator, which copies of a module share."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        remedy = "Save its state_dict(), or set comm to None first: another process has other ranks."
        got = f"comm={type(self.comm).__name__}"
        raise TypeError(message("a module", "have no communicator to be pickled", got, remedy, function="pickle"))


@functools.cache
def _say_that_statistics_stay_wide() -> None:
    """Once in a process."""
    warnings.warn(
        "cubn.torch: running statistics stay in float32 in modules of 16 bits, for with small momenta a variance of 16 "
        "bits stops moving. This is said once.",
        stacklevel=3,
    )
