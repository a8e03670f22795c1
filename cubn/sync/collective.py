"""How ranks compute over one batch: they agree, gather the nodes of their samples, and all finish the same tree.

An *exchange* serves one operation, or several at once. Each rank first gives a header of 64 bytes, which is on its way
while the rank works on its own samples. From the headers every rank knows that all do the same thing and where its
samples stand in the batch. Then one gather carries a node per aligned block of each rank's samples. What is wrong on
one rank is an error on all of them, before anything was changed.

Where the communicator takes the memory of a device, nodes never leave it and the host does not see what comes with
them. So nodes are taken first there, which only queues the work, and the header that follows has the last word on
errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import accumulate, chain, groupby, pairwise
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cubn._arguments import whole
from cubn._tree import Block, aligned_blocks
from cubn._types import BackendArray, Nodes
from cubn.backends.protocol import Backend
from cubn.errors import CollectiveMismatch, message, quoted
from cubn.sync import Bytes, Comm, Communicator, Pending, communicator

Headers = NDArray[np.void]
"""What the ranks said, as `_HEADER`s."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

OPERATIONS = ("nothing", "several operations", "moments", "forward_train", "backward")
OPTIONS = (
    *("with sizes", "update", "biased", "relu", "residual", "frozen", "global parameter gradients"),
    "device memory",
)
DTYPES = ("none", "float16", "bfloat16", "float32", "float64")
MOST = 32
"""Operations in one exchange: the header has two bits for each."""


class Terms(NamedTuple):
    """What a rank says of an operation. All but N and values must be the same on every rank."""

    operation: str
    C: int
    N: int
    dtype: str
    eps: float = 0.0
    momentum: float | None = 0.0
    start: int = 0
    """Global index of the batch's first sample."""
    forward: int = 0
    """Number of the exchange whose gradient this is."""
    values: int = 2
    """This rank's values per channel, where they matter and are known; 2 is always enough."""
    options: frozenset[str] = frozenset()
    """Those of OPTIONS that are on."""
    gathers: bool = True
    """Whether the nodes of other ranks are needed."""


class Shared(NamedTuple):
    """What an operation gets from an exchange."""

    nodes: Nodes
    """Of all ranks; of this one where the operation gathers none."""
    own: Nodes
    place: Place


class Place(NamedTuple):
    """What the backward of an operation needs to meet the other ranks again."""

    communicator: Communicator
    sizes: tuple[int, ...] | None
    """As the caller declared them; None if not."""
    exchange: int
    """Number of the forward's exchange; 0 if there was none."""

    @classmethod
    def without_exchange(cls, function: str, group: Communicator, sizes: Any, N: int) -> Place:
        """Of an operation on N samples here that exchanges nothing, and checks what its backward will rely on."""
        declared = _declared(function, sizes, group)
        _check_own(function, declared, group, N)
        return cls(group, declared, 0)


class Half(Protocol[T_co]):
    """An operation up to its exchange: its arguments checked, its outputs allocated, nothing changed yet."""

    @property
    def terms(self) -> Terms: ...

    @property
    def backend(self) -> Backend: ...

    def part(self, start: int) -> Nodes:
        """The nodes of this rank's samples, of which the first has the global index `start`."""

    def accept(self, values: int) -> None:
        """Raise unless the operation is defined for so many values per channel over all ranks (2 stands for more)."""

    def finish(self, shared: Shared) -> T_co:
        """The other half."""


class Started(Generic[T_co]):
    """An operation whose exchange is under way; `finish` waits for it and gives the operation's result.

    Every started operation must be finished, on every rank; several may be in any order. Until then its arrays must
    stay as they are.
    """

    def __init__(self, exchange: Exchange, index: int) -> None:
        self._exchange = exchange
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
        return cast(T_co, self._exchange.result(self._index))


# --- the header -----------------------------------------------------------------------------------------------------

_HEADER = np.dtype(
    [
        ("operation", "<u1"),
        ("dtype", "<u1"),
        ("operations", "<u2"),
        ("flags", "<u2"),
        ("exchange", "<u2"),
        ("C", "<i8"),
        ("N", "<i8"),
        ("eps", "<f8"),
        ("momentum", "<f8"),  # -1 for None
        ("about", "<i8"),
        ("values", "<u8"),  # 2 bits for each operation
        ("rest", "<u8"),  # hash of everything on which ranks must agree, of all operations
    ]
)
_EACH_ITS_OWN = np.zeros((), _HEADER)
_EACH_ITS_OWN["N"], _EACH_ITS_OWN["values"] = -1, 2**64 - 1
_AGREED = ~_EACH_ITS_OWN.reshape(1).view(np.uint8)  # the bits on which ranks must agree
_FAILED, _DECLARED = 1, 2  # flags; the rest of them are OPTIONS, which begin with the latter

_SAID: dict[str, Callable[[Any], str]] = {  # the fields in which ranks must agree, as an error says them
    "exchange": lambda h: f"exchange {h['exchange']}",
    "operation": lambda h: OPERATIONS[h["operation"]],
    "operations": lambda h: f"{h['operations']} operations",
    "C": lambda h: f"C={h['C']}",
    "dtype": lambda h: f"dtype={DTYPES[h['dtype']]}",
    "eps": lambda h: f"eps={h['eps']}",
    "momentum": lambda h: f"momentum={None if h['momentum'] < 0 else h['momentum']}",
    "about": lambda h: f"start={h['about']}" if OPERATIONS[h["operation"]] == "moments" else f"of forward {h['about']}",
    "flags": lambda h: ", ".join(name for bit, name in enumerate(OPTIONS, 1) if h["flags"] >> bit & 1) or "no options",
    "rest": lambda h: f"{_hashed(h)} with hash {h['rest']:016x}",
}


def _hashed(h: np.void) -> str:
    """What of all that is in the hash no other field has said."""
    if not h["flags"] & _DECLARED:
        return "operations"
    return "sizes" if h["operations"] == 1 else "operations or sizes"


def _header(
    function: str, all_terms: Sequence[Terms], exchange: int, declared: Any, on_device: bool, failed: bool
) -> Bytes:
    """What this rank says of its operations; of several, the hash says the rest."""
    first = all_terms[0] if all_terms else Terms(function, 0, 0, "none")
    several = len({terms.operation for terms in all_terms}) > 1
    on = first.options | {
        name for name, is_on in ((OPTIONS[0], declared is not None), (OPTIONS[-1], on_device)) if is_on
    }
    header = (
        OPERATIONS.index("several operations" if several else first.operation),
        DTYPES.index(first.dtype),
        len(all_terms),
        _FAILED * failed | sum(1 << bit for bit, name in enumerate(OPTIONS, 1) if name in on),
        exchange & 0xFFFF,
        sum(terms.C for terms in all_terms),
        first.N,
        first.eps,
        -1.0 if first.momentum is None else first.momentum,
        first.start or first.forward,
        sum(min(terms.values, 2) << 2 * index for index, terms in enumerate(all_terms)),
        _hash(tuple(terms._replace(N=0, values=0) for terms in all_terms), declared),
    )
    return np.array([header], _HEADER).view(np.uint8)


@lru_cache(1024)
def _hash(all_terms: tuple[Terms, ...], declared: tuple[int, ...] | None) -> int:
    """The same number in every process for the same terms."""
    agreed = [(*terms._replace(options=frozenset()), sorted(terms.options)) for terms in all_terms]
    return int.from_bytes(hashlib.blake2b(repr((agreed, declared)).encode(), digest_size=8).digest())


def _disagreement(function: str, headers: Headers) -> CollectiveMismatch | None:
    """The error every rank raises if the headers do not say the same."""
    failed = np.flatnonzero(headers["flags"] & _FAILED).tolist()
    if failed:
        return _failure(function, failed)
    rows = headers.view(np.uint8).reshape(len(headers), -1)
    if not ((rows ^ rows[0]) & _AGREED).any():
        return None
    differing = [name for name in _SAID if (headers[name] != headers[name][0]).any()]
    if "operation" in differing:  # then the rest is bound to differ
        differing = ["operation"]
    elif len(differing) > 1:
        differing = [name for name in differing if name != "rest"]  # a hash of the others, too
    said: dict[str, list[int]] = {}
    for rank, header in enumerate(headers):
        said.setdefault(", ".join(_SAID[name](header) for name in differing), []).append(rank)
    got = "; ".join(f"{what} on {_ranks(ranks)}" for what, ranks in said.items())
    remedy = "Call the same operations with the same options in the same order on all of them."
    return CollectiveMismatch(message(function, "ranks", "do the same thing", got, remedy))


def _failure(function: str, failed: Sequence[int]) -> CollectiveMismatch:
    remedy = "Its own error says more." if len(failed) == 1 else "Their own errors say more."
    return CollectiveMismatch(message(function, "ranks", "do the same thing", f"an error on {_ranks(failed)}", remedy))


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2-5`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


# --- the exchange ---------------------------------------------------------------------------------------------------

_OPEN: ContextVar[Exchange | None] = ContextVar("open", default=None)


class _Headers(NamedTuple):
    """A gather of headers."""

    pending: Pending
    received: Bytes


class Exchange:
    """One agreement and one gather, for the operations added in a `with` block; it begins where the block ends."""

    def __init__(self, communicator: Communicator) -> None:
        if communicator.broken is not None:
            raise CollectiveMismatch(
                f"cubn: comm can no longer be used, for its ranks are out of step: {communicator.broken}. "
                "Make a new communicator."
            )
        self.communicator = communicator
        self._function = OPERATIONS[0]
        self._halves: list[Half[Any]] = []
        self._declared: tuple[int, ...] | None = None
        self._on_device = False
        self._headers: _Headers | None = None  # not yet read
        self._payload: Pending | None = None
        self._begun = False
        self._error: BaseException | None = None
        self._shared: list[Shared] = []
        self._results: dict[int, Any] = {}

    def add(self, function: str, sizes: Any, make: Callable[[], Half[T]]) -> Started[T]:
        """One more operation, made here so that its errors reach the other ranks."""
        self._function = function
        declared = _declared(function, sizes, self.communicator)
        if self._halves and declared != self._declared:
            raise ValueError(message(function, "sizes", "be the same throughout a `with together` block", sizes))
        self._declared = declared
        half = make()
        N = half.terms.N
        _check_own(function, declared, self.communicator, N)
        if self._halves and N != self._halves[0].terms.N:
            rule = f"have {self._halves[0].terms.N} samples, as in the first operation of the `with together` block"
            raise ValueError(message(function, "x", rule, N, "Start it outside the block."))
        if len(self._halves) == MOST:
            raise ValueError(f"{function}: a `with together` block holds {MOST} operations at most. Begin another.")
        self._halves.append(half)
        return Started(self, len(self._halves) - 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, Exception):
            self._error = error
            with self._in_step():
                self._begin(error)
        else:
            self._leave(error)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Where an error that the other ranks do not hear of leaves this one out of step with them."""
        try:
            yield
        except BaseException as error:
            if error is not self._error:
                self._leave(error)
            raise

    def _heard(self, error: Exception) -> Exception:
        """An error to raise of which all ranks hear: they end this exchange, and may begin the next."""
        self._error = error
        return error

    def _leave(self, error: BaseException) -> None:
        """An interrupt, too little memory for the records, an error of the MPI library: the others still wait."""
        self._error = error
        self._abandon(f"this rank left an exchange with {error!r}")

    def _abandon(self, why: str) -> None:
        if self.communicator.size > 1:
            self.communicator.abandon(why)

    def _begin(self, error: Exception | None) -> None:
        """Say what this rank does, compute its part, send it. A rank with an error says so; the error goes on."""
        group = self.communicator
        self._begun = True
        self._on_device = self._stays_on_device()
        group.exchanges += 1
        self._number = group.exchanges
        samples = self._declared or self._likely()
        early = self._on_device or not self._sizes(samples)[group.rank]  # an empty record cannot tell of an error
        failure = error
        if failure is None and early:
            failure = self._compute(samples)
        headers = self._say(failure)
        if failure is not None:
            self._judge(headers)
            if failure is not error:
                raise self._heard(failure)
            return
        if not early:
            failure = self._compute(samples)
        lane = None if self._declared is None else self._lane(samples, agreed=False)
        if lane is None:
            samples, failure = self._agree(headers, samples, failure)
            lane = None if self._declared is None else self._lane(samples, agreed=True)
        else:
            self._headers = headers
        group.samples = samples
        self._send(lane or group, samples, failure)
        if failure is not None:
            if self._headers is not None:
                self._judge(self._headers)
            if self._payload is not None and group.broken is None:
                self._payload.wait()
            raise self._heard(failure)

    def _agree(
        self, headers: _Headers, samples: tuple[int, ...], failure: Exception | None
    ) -> tuple[tuple[int, ...], Exception | None]:
        """The samples of each rank, and whether the nodes could be taken now that they are known."""
        group = self.communicator
        said = self._judged(headers)
        self._accept(said)
        agreed = tuple(said["N"].tolist())
        if self._shape(agreed) != self._shape(samples):
            failure = self._compute(agreed)
        guessed = self._declared or group.samples or agreed[:1] * group.size  # by a rank that guessed right
        if self._on_device and agreed != guessed:  # others did not: the first header is not the last word
            headers = self._say(failure)
            if failure is not None:
                self._judge(headers)
                raise self._heard(failure)
            self._judged(headers)
        return agreed, failure

    def _say(self, failure: Exception | None) -> _Headers:
        """Begin the gather of headers."""
        group = self.communicator
        terms = [half.terms for half in self._halves]
        said = _header(self._function, terms, self._number, self._declared, self._on_device, failure is not None)
        sizes = [_HEADER.itemsize] * group.size
        received = np.empty(sum(sizes), np.uint8)
        return _Headers(group.gather(said, received, sizes), received)

    def _lane(self, samples: tuple[int, ...], *, agreed: bool) -> Communicator | None:
        return self.communicator.lane(self._sizes(samples), self._on_device, agreed)

    def _stays_on_device(self) -> bool:
        """Whether records go from a device's memory to a device's memory."""
        backends = {id(half.backend): half.backend for half in self._gathering()}
        return len(backends) == 1 and all(self.communicator.takes(backend) for backend in backends.values())

    def _gathering(self) -> list[Half[Any]]:
        return [half for half in self._halves if half.terms.gathers]

    def result(self, index: int) -> Any:
        """What an operation returns, once the exchange is complete."""
        if not self._begun and self._error is None:
            raise ValueError(
                "finish: what was started in a `with together` block can be finished only after the block. "
                "Start operations inside with forward_train_start or backward_start."
            )
        if not self._shared and self._error is None:
            with self._in_step():
                self._receive()
        if self._error is not None:
            raise self._error
        if index not in self._results:
            self._results[index] = self._halves[index].finish(self._shared[index])
        return self._results[index]

    def _likely(self) -> tuple[int, ...]:
        """The samples of each rank, were they as the last time, or else the same everywhere."""
        group = self.communicator
        N = self._halves[0].terms.N if self._halves else 0
        if group.samples is not None and group.samples[group.rank] == N:
            return group.samples
        return (N,) * group.size

    def _blocks(self, samples: tuple[int, ...]) -> tuple[tuple[Block, ...], ...]:
        """The aligned blocks of each rank."""
        return _blocks(self._halves[0].terms.start if self._halves else 0, samples)

    def _shape(self, samples: tuple[int, ...]) -> list[int]:
        """What of the blocks of this rank decides which nodes it computes."""
        return [hi - lo for lo, hi in self._blocks(samples)[self.communicator.rank]]

    def _sizes(self, samples: tuple[int, ...]) -> tuple[int, ...]:
        """Bytes of each rank's record."""
        return tuple(len(blocks) * self._width() * 8 for blocks in self._blocks(samples))

    def _width(self) -> int:
        """Words of a row of a record: a node of each operation, side by side."""
        return sum(_width(half) for half in self._halves)

    def _compute(self, samples: tuple[int, ...]) -> Exception | None:
        """The nodes of this rank's samples and the record of them, or why there are none."""
        try:
            first = self._halves[0].terms.start if self._halves else 0
            start = first + sum(samples[: self.communicator.rank])
            self._own = [half.part(start) for half in self._halves]
            rows = len(self._shape(samples))
            tables = [
                _table(half, nodes, rows, self._on_device)
                for half, nodes in zip(self._halves, self._own, strict=True)
                if half.terms.gathers
            ]
            self._record = self._side_by_side(tables)
        except Exception as error:
            return error
        return None

    def _side_by_side(self, tables: list[BackendArray]) -> BackendArray:
        if len(tables) == 1:
            return tables[0]
        device = self._gathering()[0].backend.device if self._on_device else None
        return np.hstack(tables or [np.empty((0, 0))]) if device is None else device.beside(tables)

    def _send(self, group: Communicator, samples: tuple[int, ...], failure: Exception | None) -> None:
        """Begin the gather of records: tables with a row for each block."""
        self._ranks_blocks = self._blocks(samples)
        sizes = self._sizes(samples)
        if failure is None:
            own = self._ranks_blocks[self.communicator.rank]
            self._own = [nodes._replace(blocks=own) if nodes.blocks else nodes for nodes in self._own]
        if not any(sizes):
            return
        backend = self._gathering()[0].backend
        shape = (sum(map(len, self._ranks_blocks)), self._width())
        if self._on_device and backend.device is not None:
            self._table = backend.device.empty(shape, "float64")
            self._payload = group.gather_on_device(backend.device, self._record, self._table, sizes)
            return
        if failure is not None:
            self._record = np.zeros((sizes[self.communicator.rank] // (8 * shape[1]), shape[1]))
            self._record.view(np.int64)[:, :1] = -1
        self._table = backend.staging(shape)
        self._payload = group.gather(_bytes(self._record), _bytes(self._table), sizes)

    def _receive(self) -> None:
        """Wait for the nodes of all ranks, and for what they said if that was not read before."""
        said = None if self._headers is None else self._judged(self._headers)
        if self._payload is not None:
            self._payload.wait()
        if said is not None:
            self._accept(said)
        if self._payload is not None and not self._on_device:
            self._check_marks()
        blocks = tuple(chain.from_iterable(self._ranks_blocks))
        place = Place(self.communicator, self._declared, self._number)
        at = 0
        for half, own in zip(self._halves, self._own, strict=True):
            nodes = own
            if half.terms.gathers and self._payload is not None:
                columns = self._table[:, at : at + _width(half)]
                nodes = Nodes(blocks, columns if self._on_device else half.backend.from_host(columns))
                at += _width(half)
            self._shared.append(Shared(nodes, own, place))

    def _check_marks(self) -> None:
        """Raise if a rank failed after its header was out: its counts are below 0 then."""
        marked = self._table.view(np.int64)[:, 0] < 0
        if marked.any():
            owners = np.repeat(np.arange(self.communicator.size), [len(blocks) for blocks in self._ranks_blocks])
            raise self._heard(_failure(self._function, np.unique(owners[marked]).tolist()))

    def _judge(self, headers: _Headers) -> tuple[Headers, CollectiveMismatch | None]:
        """What the ranks said, and the error if they do not agree.

        Where one declared its sizes, it did not wait for this: records of other lengths may be under way for ever.
        """
        headers.pending.wait()
        said = headers.received.view(_HEADER)
        mismatch = _disagreement(self._function, said)
        if mismatch is not None and (said["flags"] & _DECLARED).any():
            self._abandon(str(mismatch))
        return said, mismatch

    def _judged(self, headers: _Headers) -> Headers:
        said, mismatch = self._judge(headers)
        if mismatch is not None:
            raise self._heard(mismatch)
        return said

    def _accept(self, said: Headers) -> None:
        """Raise unless there are values enough; all ranks come to the same."""
        try:
            for index, half in enumerate(self._halves):
                half.accept(int((said["values"] >> np.uint64(2 * index) & np.uint64(3)).sum()))
        except ValueError as error:
            self._heard(error)
            raise


@lru_cache(32)  # few, since one grows with the number of ranks
def _blocks(start: int, samples: tuple[int, ...]) -> tuple[tuple[Block, ...], ...]:
    """The aligned blocks of each rank's samples; the first rank's begin at `start`."""
    return tuple(aligned_blocks(lo, hi) for lo, hi in pairwise(accumulate(samples, initial=start)))


def _table(half: Half[Any], nodes: Nodes, rows: int, on_device: bool) -> BackendArray:
    """The nodes' table where records are made; of zeros for samples without positions."""
    backend = half.backend
    if not nodes.blocks:
        zeros = np.zeros((rows, _width(half)))
        return backend.from_host(zeros) if on_device else zeros
    return nodes.table if on_device else backend.to_host(nodes.table, backend.staging(nodes.table.shape))


def _bytes(table: NDArray[np.float64]) -> Bytes:
    return table.reshape(-1).view(np.uint8)


def _width(half: Half[Any]) -> int:
    """Words of a node: its count, and two for each channel."""
    return 2 * half.terms.C + 1 if half.terms.gathers else 0


def check_sizes(function: str, sizes: Any, comm: Any) -> None:
    """Sizes say nothing without the ranks whose they are."""
    if sizes is not None and comm is None:
        remedy = "They are the samples of its ranks."
        raise ValueError(message(function, "sizes", "be given together with comm", "comm=None", remedy))


def _declared(function: str, sizes: Any, group: Communicator) -> tuple[int, ...] | None:
    """The samples of each rank, where the caller knows them."""
    if sizes is None:
        return None
    rule = f"be the number of samples of each of the {group.size} ranks"
    if not isinstance(sizes, Iterable):
        raise TypeError(message(function, "sizes", rule, quoted(sizes)))
    declared = tuple(whole(size, function, "sizes") for size in sizes)
    if len(declared) != group.size or not all(0 <= size < 1 << 62 for size in declared):
        raise ValueError(message(function, "sizes", rule, sizes))
    return declared


def _check_own(function: str, declared: tuple[int, ...] | None, group: Communicator, N: int) -> None:
    """This rank's size is that of its x."""
    if declared is not None and declared[group.rank] != N:
        rule = f"be {N} for rank {group.rank}, the samples of its x"
        raise ValueError(message(function, "sizes", rule, declared))


# --- how operations begin one ---------------------------------------------------------------------------------------


def start(function: str, comm: Any, sizes: Any, make: Callable[[], Half[T]]) -> Started[T]:
    """Begin an operation in an exchange of its own, or add it to the one that is open on its communicator."""
    group = communicator(comm)
    shared = _OPEN.get()
    if shared is not None and shared.communicator is group:
        return shared.add(function, sizes, make)
    with Exchange(group) as exchange:
        started = exchange.add(function, sizes, make)
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
    with Exchange(communicator(comm)) as exchange:
        token = _OPEN.set(exchange)
        try:
            yield
        finally:
            _OPEN.reset(token)
