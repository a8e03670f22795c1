"""How operations go through an exchange with the other ranks: begun alone or several together, and finished one by one.

With `comm=` an operation is cut in two: its local part, then the nodes of all ranks are gathered, then each rank
finishes the same tree. What is wrong on one rank is an error on all of them, before anything was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, Self, TypeVar, cast

from cubn._arguments import as_int
from cubn._types import Nodes
from cubn.errors import CollectiveMismatch, message, quoted, reported, reporting_as
from cubn.sync import Comm, communicator
from cubn.sync.exchange import Exchange, LocalPart, begin, leave
from cubn.sync.header import MAX_OPERATIONS, OPERATIONS, Terms
from cubn.sync.transport import Communicator

if TYPE_CHECKING:
    from cubn.backends.cuda.device import Device, Stream

__all__ = ["Gathered", "Operation", "Started", "SyncContext", "Terms", "check_sizes", "start", "together"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class SyncContext(NamedTuple):
    """What the backward of an operation needs to meet the other ranks again."""

    communicator: Communicator
    sizes: tuple[int, ...] | None
    """As the caller declared them; None if not."""
    exchange: int
    """Number of the forward's exchange; 0 if there was none."""

    @classmethod
    def without_exchange(cls, group: Communicator, sizes: Any, N: int) -> SyncContext:
        """Of an operation on N samples here that exchanges nothing, and checks what its backward will rely on."""
        declared = _declared(sizes, group)
        _check_own(declared, group, N)
        return cls(group, declared, 0)


class Gathered(NamedTuple):
    """What an operation gets from an exchange."""

    nodes: Nodes
    """Of all ranks; of this one where the operation gathers none."""
    own: Nodes
    context: SyncContext


class Operation(LocalPart, Protocol[T_co]):
    """An operation up to its exchange: its arguments checked, its outputs allocated, nothing changed yet."""

    def finish(self, gathered: Gathered) -> T_co:
        """The rest, and the operation's result."""


class Started(Generic[T_co]):
    """An operation whose exchange is under way; `finish` waits for it and gives the operation's result.

    Every started operation must be finished, on every rank; several may be in any order. Until then its arrays must
    stay as they are.
    """

    def __init__(self, operations: _Together, index: int) -> None:
        self._operations = operations
        self._index = index

    def finish(self) -> T_co:
        """Wait for the other ranks and compute the rest.

        Returns
        -------
        object
            What the operation of this name without `_start` returns. A second call returns the same.

        Raises
        ------
        CollectiveMismatch
            If the ranks do not do the same thing, or another one failed; on every rank.
        ValueError
            If there are not enough values per channel over all ranks; or inside the `together` this was started in.
        """
        return cast(T_co, self._operations.result(self._index))


# --- how operations begin one ---------------------------------------------------------------------------------------


def start(comm: Any, sizes: Any, make: Callable[[], Operation[T]]) -> Started[T]:
    """Begin an operation in an exchange of its own, or add it to those that are together on its communicator."""
    group = communicator(comm)
    shared = _OPEN.get()
    if shared is not None and shared.communicator is group:
        return shared.add(sizes, make)
    with _Together(group) as alone:
        started = alone.add(sizes, make)
    return started


@contextmanager
def together(comm: Comm) -> Iterator[None]:
    """Let the operations started inside share one message: one latency instead of one each.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or Communicator
        Operations started on another one inside the block are not concerned.

    Raises
    ------
    CollectiveMismatch
        Where the block ends, if the ranks did not start the same operations in it, or another rank raised an error
        inside; on every rank.

    Notes
    -----
    The exchange begins where the block ends; call `finish` of each operation after it. At most 32 operations, all with
    the same number of samples on this rank. The same bits as one by one.
    """
    with _Together(communicator(comm)) as operations:
        token = _OPEN.set(operations)
        try:
            yield
        finally:
            _OPEN.reset(token)


class _Together:
    """The operations of one exchange: added in a `with` block, begun where it ends."""

    def __init__(self, communicator: Communicator) -> None:
        if communicator.broken is not None:
            raise CollectiveMismatch(
                f"cubn: comm can no longer be used, for its ranks are out of step: {communicator.broken}. "
                "Make a new communicator."
            )
        self.communicator = communicator
        self._name = OPERATIONS[0]
        self._operations: list[Operation[Any]] = []
        self._sizes: tuple[int, ...] | None = None
        self._exchange: Exchange | None = None
        self._error: BaseException | None = None
        self._gathered: list[Gathered] = []
        self._results: dict[int, Any] = {}
        self._last: dict[Device, Stream] = {}  # that worked for these operations
        self._moved = False  # from one stream to another

    def __enter__(self) -> Self:
        return self

    def add(self, sizes: Any, make: Callable[[], Operation[T]]) -> Started[T]:
        """One more operation, made here so that its errors reach the other ranks."""
        self._name = reported()
        declared = _declared(sizes, self.communicator)
        if self._operations and declared != self._sizes:
            raise ValueError(message("sizes", "be the same throughout a `with together` block", sizes))
        self._sizes = declared
        operation = make()
        N = operation.terms.N
        _check_own(declared, self.communicator, N)
        if self._operations and N != self._operations[0].terms.N:
            rule = f"have {self._operations[0].terms.N} samples, as in the first operation of the `with together` block"
            raise ValueError(message("x", rule, N, "Start it outside the block."))
        if len(self._operations) == MAX_OPERATIONS:
            most = f"a `with together` block holds {MAX_OPERATIONS} operations at most. Begin another."
            raise ValueError(f"{reported()}: {most}")
        self._operations.append(operation)
        self._follow(operation)
        return Started(self, len(self._operations) - 1)

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self._error = error
        if error is not None and not isinstance(error, Exception):
            leave(self.communicator, error)
            return
        with reporting_as(self._name), self._keeping_errors():
            self._follow(*self._operations)
            self._exchange = begin(self.communicator, self._operations, self._sizes, error)

    def result(self, index: int) -> Any:
        """What an operation returns, once the exchange is complete."""
        if self._error is not None:
            raise self._error
        if self._exchange is None:
            raise ValueError(
                "finish: what was started in a `with together` block can be finished only after the block. "
                "Start operations inside with forward_train_start or backward_start."
            )
        if not self._gathered:
            context = SyncContext(self.communicator, self._sizes, self._exchange.call.number)
            with reporting_as(self._name), self._keeping_errors():
                self._follow(*self._operations)
                self._gathered = [Gathered(*nodes, context) for nodes in self._exchange.finish()]
        if index not in self._results:
            operation = self._operations[index]
            with reporting_as(operation.terms.operation):
                self._follow(operation)
                self._results[index] = operation.finish(self._gathered[index])
                self._keep_for(operation)
        return self._results[index]

    def _follow(self, *operations: Operation[Any]) -> None:
        """What comes next on the current streams comes behind all that was done for operations of this exchange."""
        for operation in operations:
            device = operation.backend.device
            if device is None:
                continue
            stream = device.stream()
            before = self._last.setdefault(device, stream)
            if before is not stream:
                device.wait_for(before)
                self._last[device], self._moved = stream, True

    def _keep_for(self, operation: Operation[Any]) -> None:
        """What was made on other streams than the current one stays until that is done with it."""
        device = operation.backend.device
        if device is not None and self._moved:
            device.hold(operation, self._exchange, self._gathered)

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        """An error of the exchange is one of each operation in it."""
        try:
            yield
        except BaseException as error:
            self._error = error
            raise


_OPEN: ContextVar[_Together | None] = ContextVar("open", default=None)


# --- sizes ----------------------------------------------------------------------------------------------------------


def check_sizes(sizes: Any, comm: Any) -> None:
    """Sizes say nothing without the ranks whose they are."""
    if sizes is not None and comm is None:
        remedy = "They are the samples of its ranks."
        raise ValueError(message("sizes", "be given together with comm", "comm=None", remedy))


def _declared(sizes: Any, group: Communicator) -> tuple[int, ...] | None:
    """The samples of each rank, where the caller knows them."""
    if sizes is None:
        return None
    rule = f"be the number of samples of each of the {group.size} ranks"
    if not isinstance(sizes, Iterable):
        raise TypeError(message("sizes", rule, quoted(sizes)))
    declared = tuple(as_int(size, "sizes") for size in sizes)
    if len(declared) != group.size or not all(0 <= size < 1 << 62 for size in declared):
        raise ValueError(message("sizes", rule, sizes))
    return declared


def _check_own(declared: tuple[int, ...] | None, group: Communicator, N: int) -> None:
    """This rank's size is that of its x."""
    if declared is not None and declared[group.rank] != N:
        rule = f"be {N} for rank {group.rank}, the samples of its x"
        raise ValueError(message("sizes", rule, declared))
