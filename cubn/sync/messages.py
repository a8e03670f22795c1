"""Messages of any length from every rank to every other: what is said besides the nodes of a batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import numpy as np

from cubn._types import HOST, Nodes
from cubn.backends import backend_for
from cubn.backends.protocol import Backend
from cubn.sync import Comm, collective
from cubn.sync.collective import Gathered
from cubn.sync.exchange import leave
from cubn.sync.header import Terms


def exchanged(comm: Comm, operation: str, make: Callable[[], bytes]) -> list[bytes]:
    """What each rank says, in rank order.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or Communicator
        All its ranks call this.
    operation : str
        One of those that headers know.
    make : callable
        Gives what this rank says. Where it raises an error, the other ranks hear of it.

    Raises
    ------
    CollectiveMismatch
        If ranks do not do the same thing, or another one failed; on every rank.
    """
    return collective.start(comm, None, lambda: _Message(operation, make())).finish()


class _Message:
    """An operation without nodes, whose samples are the bytes of a message."""

    def __init__(self, operation: str, said: bytes) -> None:
        self._said = said
        self.terms = Terms(operation, 0, len(said), "none", gathers=False)

    @property
    def backend(self) -> Backend:
        return backend_for(HOST)

    def part(self, start: int, total: int) -> Nodes:
        return Nodes((), np.empty((0, 1)))

    def accept(self, values: int) -> None:
        """A message is about no values."""

    def finish(self, gathered: Gathered) -> list[bytes]:
        """One more gather, now that every rank knows how long the messages are."""
        group, sizes = gathered.context.communicator, gathered.samples
        received = np.empty(sum(sizes), np.uint8)
        try:
            group.gather(np.frombuffer(self._said, np.uint8), received, sizes).wait()
        except BaseException as error:
            leave(group, error)
            raise
        return [received[lo:hi].tobytes() for lo, hi in pairwise(accumulate(sizes, initial=0))]
