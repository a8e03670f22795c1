"""Whether a forward is one that activation checkpointing computes again."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether this thread is in a backward pass, where a forward repeats one that has been counted.

    The number of the backward pass at work, or -1, is private in torch, and the only sign there is of a recomputation,
    reentrant or not. torch's own FSDP and module trackers go by it.
    """
    return torch._C._current_graph_task_id() != -1
