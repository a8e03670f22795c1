"""What carries records between ranks: one gather of bytes, in rank order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from cubn._types import BackendArray
from cubn.backends.protocol import Backend

if TYPE_CHECKING:
    from cubn.backends.cuda.device import Device

Bytes = NDArray[np.uint8]


class Pending(Protocol):
    """A gather that is under way."""

    def wait(self) -> None:
        """Return when the records of all ranks are there; called once. On a device: when they are, in stream order."""


class Communicator(ABC):
    """A fixed group of ranks, each with a part of the batch; the order of the ranks is the order of the samples.

    To make cubn work over something new, derive from this class and pass an instance as `comm=`. It must be for cubn
    alone: nothing else may pass through the same channel.

    Parameters
    ----------
    rank, size : int
        Which rank this is, and of how many.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.exchanges = 0
        """How many exchanges have begun; the same number on every rank."""
        self.samples: tuple[int, ...] | None = None
        """Samples on each rank, as last agreed on: a guess of the next."""
        self.broken: str | None = None
        """Why nothing more can be exchanged, if so."""

    @abstractmethod
    def gather(self, record: Bytes, received: Bytes, sizes: Sequence[int]) -> Pending:
        """Begin to give this rank's record to every rank, and to get theirs.

        Parameters
        ----------
        record : contiguous numpy.ndarray of uint8
            Of sizes[rank] bytes; it is not changed, and the caller keeps it until the gather is done.
        received : contiguous numpy.ndarray of uint8
            Where the records of all ranks go, one behind the other in rank order.
        sizes : sequence of int
            Bytes from each rank, the same on every rank.

        Returns
        -------
        Pending
            Gathers of one communicator begin in the same order on all ranks, and may be waited for in any.
        """

    def takes(self, backend: Backend) -> bool:
        """Whether records may be in the memory of this backend's device, for `gather_on_device`."""
        return False

    def gather_on_device(
        self, device: Device, record: BackendArray, received: BackendArray, sizes: Sequence[int]
    ) -> Pending:
        """`gather` of dense arrays on a device, behind the work on its stream."""
        raise NotImplementedError

    def lane(self, sizes: tuple[int, ...], on_device: bool, agreed: bool) -> Communicator | None:
        """Where records of these sizes may go before all ranks are known to agree on them; None: nowhere (yet).

        If they have `agreed`, they may make one together.
        """
        return None

    def abandon(self, why: str) -> None:
        """Ranks are out of step: what is under way may never arrive, and nothing more can be exchanged."""
        self.broken = why
