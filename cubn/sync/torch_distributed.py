"""Process groups of torch.distributed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store

from cubn.errors import message
from cubn.sync.transport import Bytes, Communicator


class _Pending(NamedTuple):
    work: Any
    padded: torch.Tensor
    received: Bytes
    record: torch.Tensor  # must outlive the work
    sizes: Sequence[int]

    def wait(self) -> None:
        self.work.wait()
        rows: Bytes = self.padded.numpy()
        np.concatenate([row[:size] for row, size in zip(rows, self.sizes, strict=True)], out=self.received)


class TorchCommunicator(Communicator):
    """A private gloo backend of the ranks of a process group; records shorter than the longest are padded to it.

    It meets in the group's own store. `dist.new_group` among these ranks alone would wait for ever where they are in
    different numbers of groups, since it names the new one by that (pytorch #173608).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        store = getattr(group, "get_group_store", _get_default_store)()  # the latter for torch before 2.9
        store = dist.PrefixStore(f"cubn/{group.group_name}", store)  # type: ignore[attr-defined]
        self._gloo: Any = dist.ProcessGroupGloo(store, self.rank, self.size, default_pg_timeout)

    def gather(self, record: Bytes, received: Bytes, sizes: Sequence[int]) -> _Pending:
        longest = max(sizes)
        padded = np.zeros(longest, np.uint8)
        padded[: len(record)] = record
        sent = torch.from_numpy(padded)
        rows = torch.empty((self.size, longest), dtype=torch.uint8)
        work = self._gloo.allgather([list(rows)], [sent])
        return _Pending(work, rows, received, sent, sizes)


_KNOWN: weakref.WeakKeyDictionary[dist.ProcessGroup, TorchCommunicator] = weakref.WeakKeyDictionary()


def communicator(group: dist.ProcessGroup) -> TorchCommunicator:
    """The communicator made for a process group, or a new one."""
    if group not in _KNOWN:
        if dist.get_rank(group) < 0:
            rule, remedy = "be a process group this process is in", "Call it on the ranks of the group alone."
            raise ValueError(message("comm", rule, "another one", remedy, function="cubn"))
        _KNOWN[group] = TorchCommunicator(group)
    return _KNOWN[group]
