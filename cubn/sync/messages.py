"""Messages of any length between ranks: each gives one and gets those of all, or all of them hear of an error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cubn.sync import Comm, communicator, header
from cubn.sync.exchange import leave
from cubn.sync.header import HEADER, Terms
from cubn.sync.transport import Bytes, Communicator


def gather(comm: Comm | None, operation: str, make: Callable[[], bytes]) -> list[bytes]:
    """What `make` returns on each rank, in rank order; on this one alone without a comm.

    An error of `make` is raised here, and a CollectiveMismatch on the other ranks.

    Parameters
    ----------
    operation : str
        One of `header.OPERATIONS`, the same on all ranks.
    """
    if comm is None:
        return [make()]
    group = communicator(comm)
    group.check_in_step()
    try:
        return _gather(group, operation, make)
    except _HeardByAll as heard:
        error = heard.error
    except BaseException as left:
        leave(group, left)
        raise
    raise error


class _HeardByAll(Exception):
    """Carries an error of which all ranks hear."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _gather(group: Communicator, operation: str, make: Callable[[], bytes]) -> list[bytes]:
    said, error = b"", None
    try:
        said = make()
    except Exception as failure:
        error = failure
    group.exchanges += 1
    terms = Terms(operation, 0, len(said), "none")
    own = header.encode([terms], group.exchanges, None, failed=error is not None)
    headers = header.decode(_received(group, own, (HEADER.itemsize,) * group.size))
    mismatch = header.disagreement(headers)
    if mismatch is not None and header.any_declared(headers):  # records of that rank may be under way for ever
        group.abandon(str(mismatch))
    if failure_of_a_rank := error or mismatch:
        raise _HeardByAll(failure_of_a_rank)
    sizes = header.samples(headers)
    received = _received(group, np.frombuffer(said, np.uint8), sizes)
    ends = np.cumsum(sizes).tolist()
    return [received[end - size : end].tobytes() for size, end in zip(sizes, ends, strict=True)]


def _received(group: Communicator, record: Bytes, sizes: tuple[int, ...]) -> Bytes:
    """The records of all ranks, one behind the other."""
    received = np.empty(sum(sizes), np.uint8)
    group.gather(record, received, sizes).wait()
    return received
