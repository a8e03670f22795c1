"""Counters of updates: a module's, and those of each channel that kernels write."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cubn._state.counted import counted_in
from cubn._types import Counters as Addresses
from cubn.errors import message
from cubn.state import BatchNormState

increment_version = torch.autograd.graph.increment_version


class Counters(NamedTuple):
    """Of updates of the running statistics: an int64 scalar, and int64 (C,), how many of them passed a channel over."""

    num_batches_tracked: Tensor
    skipped: Tensor


NO_COUNTERS = None, None


class Uncounted(NamedTuple):
    """Room for the counters of each channel that kernels write and nobody reads, and where they are."""

    memory: Tensor
    tracked: int
    skipped: int

    @classmethod
    @cache  # one for all layouts and streams: it never goes back to be somebody else's while kernels write it
    def of(cls, channels: int, device: torch.device) -> Uncounted:
        memory = torch.zeros(2, channels, dtype=torch.int64, device=device)
        return cls(memory, memory[0].data_ptr(), memory[1].data_ptr())


def is_locked(mean: Tensor) -> bool:
    """Whether torch lets nobody write it: it was made in inference mode, which is over."""
    return mean.is_inference() and not torch.is_inference_mode_enabled()


def check_unlocked(mean: Tensor) -> None:
    if is_locked(mean):
        remedy = "Assign a clone of it to the module, or train in inference mode."
        rule = "be no inference tensor, which cannot be updated outside of inference mode"
        raise RuntimeError(message("running_mean", rule, "one", remedy, function="batch_norm"))


def fits(counter: Tensor, channels: int, mean: Tensor) -> bool:
    """Whether kernels can write it as a counter beside the running statistics."""
    return (
        counter.dtype is torch.int64
        and counter.numel() == channels
        and counter.device == mean.device
        and counter.is_contiguous()
    )


def per_channel(counters: Counters | None, mean: Tensor, momentum: float | None) -> tuple[Tensor, Tensor]:
    """Counters of each channel, for kernels: what they were, where a weight depends on it."""
    if counters is None:
        tracked, skipped = torch.zeros(2, len(mean), dtype=torch.int64, device=mean.device)
        return tracked, skipped
    tracked, skipped = counters
    for name, given, size in zip(Counters._fields, counters, (1, len(mean)), strict=True):
        if not fits(given, size, mean):
            rule = f"be {size} of int64, contiguous, on the device of running_mean, {mean.device}"
            got = f"{given.dtype} {tuple(given.shape)}, strides={given.stride()}, on {given.device}"
            raise ValueError(message(name, rule, got, function="batch_norm"))
    return tracked.expand(len(mean)).contiguous() if momentum is None else torch.zeros_like(skipped), skipped


def count_in(state: BatchNormState, tracked: Tensor, skipped: Tensor) -> None:
    """Let a state count in these, which are where its running statistics are."""
    at = Addresses(tracked.data_ptr(), skipped.data_ptr())
    state._counters = counted_in(state._place(), (tracked, skipped), at)


def count(counters: Counters, tracked: Tensor | None) -> None:
    """One more update. Where an average began anew, the batches before it count as skipped, so that it is always of
    num_batches_tracked - skipped.
    """
    counters.num_batches_tracked.add_(1)
    if tracked is None:
        increment_version((counters.skipped,))
    else:
        counters.skipped.add_(counters.num_batches_tracked - tracked)
