"""An exchange: one agreement of the ranks and one gather of their nodes, over a communicator.

Each rank gives a header, which is on its way while the rank works on its own samples. From the headers every rank knows
that all do the same thing and where its samples stand in the batch. Then one gather carries the records. What is wrong
on one rank is an error on all of them.

Where the communicator takes the memory of a device, nodes never leave it and the host does not see what comes with
them. So nodes are taken first there, which only queues the work, and the header that follows has the last word on
errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cubn._groups import Cut
from cubn._types import BackendArray, Nodes
from cubn.backends.protocol import Backend
from cubn.sync import header
from cubn.sync.header import HEADER, Headers, Terms
from cubn.sync.records import RecordLayout, failed_ranks, failed_record, pack, unpack
from cubn.sync.transport import Bytes, Communicator, Pending

T = TypeVar("T")


class LocalPart(Protocol):
    """What an operation does on this rank up to the exchange."""

    @property
    def terms(self) -> Terms: ...

    @property
    def backend(self) -> Backend: ...

    def part(self, start: int, total: int) -> Nodes:
        """The nodes of this rank's samples, of which the first has the global index `start`; all ranks have `total`."""

    def accept(self, values: int) -> None:
        """Raise unless the operation is defined for so many values per channel over all ranks (2 stands for more)."""


class Exchange(NamedTuple):
    """An exchange under way."""

    call: CollectiveCall
    layout: RecordLayout
    local: list[Nodes]
    """This rank's nodes, for each operation."""
    headers: _Gather | None
    """Those of all ranks, where they were not read before records went out."""
    records: _Gather | None
    """Those of all ranks, if there are any."""

    def finish(self) -> list[tuple[Nodes, Nodes]]:
        """Wait for the other ranks; called once.

        Returns
        -------
        list of (Nodes, Nodes)
            For each operation those of all ranks (of this one where it gathers none), and those of this rank.
        """
        return _in_step(self.call.communicator, lambda: _receive(self))


def begin(
    communicator: Communicator,
    parts: Sequence[LocalPart],
    sizes: tuple[int, ...] | None,
    error: Exception | None,
) -> Exchange | None:
    """Say what this rank does, compute its part, send it.

    Parameters
    ----------
    sizes : tuple of int, optional
        The samples of each rank, where the caller declared them.
    error : Exception, optional
        Why this rank takes no part: the others hear of it, nothing is sent, and there is nothing to finish.
    """

    def steps() -> Exchange | None:
        call = CollectiveCall.of(communicator, parts, sizes)
        if error is None:
            return _begin(call)
        _read(call, _say(call, failed=True))
        return None

    return _in_step(communicator, steps)


# --- what is fixed when it begins -----------------------------------------------------------------------------------


class CollectiveCall(NamedTuple):
    """With what a rank comes to an exchange."""

    communicator: Communicator
    number: int
    """Of the exchange, on this communicator."""
    parts: tuple[LocalPart, ...]
    sizes: tuple[int, ...] | None
    on_device: bool
    """Whether records go from a device's memory to a device's memory."""

    @classmethod
    def of(
        cls, communicator: Communicator, parts: Sequence[LocalPart], sizes: tuple[int, ...] | None
    ) -> CollectiveCall:
        backends = {id(part.backend): part.backend for part in parts if part.terms.gathers}
        on_device = len(backends) == 1 and all(communicator.takes(backend) for backend in backends.values())
        communicator.exchanges += 1
        return cls(communicator, communicator.exchanges, tuple(parts), sizes, on_device)

    @property
    def rank(self) -> int:
        return self.communicator.rank

    @property
    def backends(self) -> list[Backend]:
        return [part.backend for part in self.parts]

    def likely_samples(self) -> tuple[int, ...]:
        """The samples of each rank: as declared, or else as the last time, or else the same everywhere."""
        if self.sizes is not None:
            return self.sizes
        N = self.parts[0].terms.N if self.parts else 0
        last = self.communicator.samples
        return last if last is not None and last[self.rank] == N else (N,) * self.communicator.size

    def layout(self, samples: tuple[int, ...]) -> RecordLayout:
        start = self.parts[0].terms.start if self.parts else 0
        cut = self.parts[0].terms.cut if self.parts else Cut()
        return RecordLayout(start, samples, tuple(part.terms.width for part in self.parts), cut)

    def lane(self, layout: RecordLayout, *, agreed: bool) -> Communicator | None:
        """Where records of declared sizes may go; None: nowhere (yet)."""
        return None if self.sizes is None else self.communicator.lane(layout.sizes, self.on_device, agreed)


# --- what a rank gives, and what comes from all of them -------------------------------------------------------------


class _Gather(NamedTuple):
    """A gather under way, and its memory."""

    pending: Pending
    given: BackendArray
    received: BackendArray


class _Contribution(NamedTuple):
    """What this rank gives: its nodes, for each operation, and the record of those that are gathered."""

    nodes: list[Nodes]
    record: BackendArray


def _begin(call: CollectiveCall) -> Exchange:
    group = call.communicator
    layout = call.layout(call.likely_samples())
    early = call.on_device or not layout.sizes[call.rank]  # an empty record cannot tell of an error
    own = _compute(call, layout) if early else None
    headers = _say(call, failed=isinstance(own, Exception))
    if isinstance(own, Exception):
        _read(call, headers)
        raise _HeardByAll(own)
    if own is None:
        own = _compute(call, layout)
    lane = call.lane(layout, agreed=False)
    unread = None if lane is None else headers
    if lane is None:
        layout, own = _agree(call, headers, layout, own)
        lane = call.lane(layout, agreed=True)
    group.samples = layout.samples
    sent = _send(call, lane or group, layout, own)
    if isinstance(own, Exception):
        if unread is not None:
            _read(call, unread)
        if sent is not None and group.broken is None:
            sent.pending.wait()
        raise _HeardByAll(own)
    return Exchange(call, layout, own.nodes, unread, sent)


def _say(call: CollectiveCall, *, failed: bool) -> _Gather:
    """Begin the gather of headers."""
    terms = [part.terms for part in call.parts]
    said = header.encode(terms, call.number, call.sizes, on_device=call.on_device, failed=failed)
    sizes = [HEADER.itemsize] * call.communicator.size
    received = np.empty(sum(sizes), np.uint8)
    return _Gather(call.communicator.gather(said, received, sizes), said, received)


def _compute(call: CollectiveCall, layout: RecordLayout) -> _Contribution | Exception:
    """What this rank gives, or why it cannot."""
    try:
        first, total = layout.first(call.rank), sum(layout.samples)
        nodes = [part.part(first, total) for part in call.parts]
        return _Contribution(nodes, pack(layout, call.rank, nodes, call.backends, call.on_device))
    except Exception as error:
        return error


def _agree(
    call: CollectiveCall, headers: _Gather, guess: RecordLayout, own: _Contribution | Exception
) -> tuple[RecordLayout, _Contribution | Exception]:
    """How records lie and what this rank gives, now that the samples of each rank are known."""
    group = call.communicator
    said = _read_matching(call, headers)
    _accept(call, said)
    layout = call.layout(header.samples(said))
    if layout.block_sizes(call.rank) != guess.block_sizes(call.rank):
        own = _compute(call, layout)
    guessed = call.sizes or group.samples or layout.samples[:1] * group.size  # by a rank that guessed right
    if call.on_device and layout.samples != guessed:  # others did not: the first header is not the last word
        headers = _say(call, failed=isinstance(own, Exception))
        if isinstance(own, Exception):
            _read(call, headers)
            raise _HeardByAll(own)
        _read_matching(call, headers)
    return layout, own


def _send(
    call: CollectiveCall, group: Communicator, layout: RecordLayout, own: _Contribution | Exception
) -> _Gather | None:
    """Begin the gather of records."""
    if not any(layout.sizes):
        return None
    record = failed_record(layout, call.rank) if isinstance(own, Exception) else own.record
    backend = next(part.backend for part in call.parts if part.terms.gathers)
    if call.on_device and backend.device is not None:
        received = backend.device.empty(layout.shape, "float64")
        pending = group.gather_on_device(backend.device, record, received, layout.sizes)
    else:
        received = backend.staging(layout.shape)
        pending = group.gather(_bytes(record), _bytes(received), layout.sizes)
    return _Gather(pending, record, received)


def _bytes(table: NDArray[Any]) -> Bytes:
    return table.reshape(-1).view(np.uint8)


def _receive(exchange: Exchange) -> list[tuple[Nodes, Nodes]]:
    """Wait for the nodes of all ranks, and for what they said if that was not read before."""
    call, layout, local, headers, records = exchange
    said = None if headers is None else _read_matching(call, headers)
    if records is not None:
        records.pending.wait()
    if said is not None:
        _accept(call, said)
    if records is not None and not call.on_device:
        _check_records(call, layout, records)
    blocks = layout.blocks[call.rank]  # where nodes were taken by a guess, they turned out to stand elsewhere
    own = [nodes._replace(blocks=blocks) if nodes.blocks else nodes for nodes in local]
    if records is None:
        return [(nodes, nodes) for nodes in own]
    of_all = unpack(layout, records.received, call.backends, call.on_device)
    return [(nodes or here, here) for nodes, here in zip(of_all, own, strict=True)]


# --- in step, or out of step ----------------------------------------------------------------------------------------


class _HeardByAll(Exception):
    """Carries an error of which all ranks hear: they end this exchange, and may begin the next."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _in_step(communicator: Communicator, steps: Callable[[], T]) -> T:
    """Take steps in which an error that the other ranks do not hear of leaves this one out of step with them."""
    try:
        return steps()
    except _HeardByAll as heard:
        error = heard.error
    except BaseException as left:
        leave(communicator, left)
        raise
    raise error


def leave(communicator: Communicator, error: BaseException) -> None:
    """An interrupt, too little memory for the records, an error of the MPI library: the others still wait."""
    _abandon(communicator, f"this rank left an exchange with {error!r}")


def _abandon(communicator: Communicator, why: str) -> None:
    if communicator.size > 1:
        communicator.abandon(why)


def _read(call: CollectiveCall, headers: _Gather) -> tuple[Headers, Exception | None]:
    """What the ranks said, and the error if they do not agree.

    Where one declared its sizes, it did not wait for this: records of other lengths may be under way for ever.
    """
    headers.pending.wait()
    said = header.decode(headers.received)
    mismatch = header.disagreement(said)
    if mismatch is not None and header.any_declared(said):
        _abandon(call.communicator, str(mismatch))
    return said, mismatch


def _read_matching(call: CollectiveCall, headers: _Gather) -> Headers:
    """What the ranks said, all the same."""
    said, mismatch = _read(call, headers)
    if mismatch is not None:
        raise _HeardByAll(mismatch)
    return said


def _accept(call: CollectiveCall, said: Headers) -> None:
    """Raise unless there are values enough; all ranks come to the same."""
    try:
        for index, part in enumerate(call.parts):
            part.accept(header.values(said, index))
    except ValueError as error:
        raise _HeardByAll(error) from error


def _check_records(call: CollectiveCall, layout: RecordLayout, records: _Gather) -> None:
    """Raise if a rank failed after its header was out."""
    ranks = failed_ranks(layout, records.received)
    if ranks:
        raise _HeardByAll(header.failure(ranks))
