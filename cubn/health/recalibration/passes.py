"""The passes of a recalibration over its batches: pooled on this rank, kept in a file, joined with the other ranks'."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from itertools import pairwise, zip_longest
from operator import add
from typing import Any, NamedTuple, Protocol

from cubn._moments import Moments
from cubn.errors import CollectiveMismatch, message
from cubn.health.recalibration.commit import Target
from cubn.health.recalibration.file import RecordFile
from cubn.health.recalibration.record import Record, Written, as_message, of_message
from cubn.moments import moments
from cubn.sync import Comm, communicator
from cubn.sync.messages import exchanged
from cubn.typing import AnyArray

Stage = tuple[str, ...]
"""Layers whose inputs are pooled in the same pass."""


class Pools:
    """Moments of what layers were given, one batch after the other.

    A layer that is called several times in a forward has a pool for each of its calls. So each is of samples in their
    order, wherever they were cut into batches.
    """

    def __init__(self, before: Mapping[str, tuple[Moments, ...]], start: int) -> None:
        self.found = dict(before)
        self.start = start
        """Global index of the first sample."""

    def add(
        self, name: str, call: int, x: AnyArray, channels: int, *, first: int | None = None, **options: Any
    ) -> tuple[Moments, Moments]:
        """One more input of a call of a layer: its moments, and what there is of that call. `first` is where its
        samples begin.
        """
        pools = self.found.get(name, ())
        before = pools[call] if call < len(pools) else None
        start = before.stop if before else self.start if first is None else first
        taken = moments(x, start=start, **options)
        if taken.num_features != channels:
            rule = f"have {channels} channels{f' for {name}' if name else ''}"
            raise ValueError(message("a batch", rule, taken.num_features))
        together = before.merge(taken) if before else taken
        self.found[name] = (*pools[:call], together, *pools[call + 1 :])
        return taken, together


Observe = Callable[[Any, Pools], None]
"""Adds what layers are given of a batch to pools."""


class Subject(Protocol):
    """What is recalibrated."""

    @property
    def targets(self) -> Mapping[str, Target]: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a recalibration of the same subject has, too, in words and numbers of JSON."""

    def digest(self) -> str:
        """Of all that the inputs of layers depend on but for the batches."""

    def stages(self, batches: Iterable[Any]) -> list[Stage]:
        """One for each pass, in order; none where there are no batches to tell."""

    def observing(self, stage: Stage, done: Mapping[str, Moments]) -> AbstractContextManager[Observe]:
        """A pass, in which what is done has its new statistics already."""


class Options(NamedTuple):
    """Of a recalibration."""

    comm: Comm | None
    start: int | None
    checkpoint: Any
    checkpoint_every: int
    progress: bool | None


class Recalibration:
    """One that is under way."""

    def __init__(self, batches: Iterable[Any], options: Options) -> None:
        self.batches, self.options = batches, options
        self.record = Record()
        self.file: RecordFile | None = None

    def run(self, make: Callable[[], Subject]) -> tuple[Subject, Record]:
        """Pool everything; the subject that `make` gives, and the record. What `make` raises, all ranks hear of."""
        subjects: list[Subject] = []

        def begin() -> Written:
            subject = make()
            subjects.append(subject)
            self._open_file(subject)
            about = {
                "subject": subject.identity,
                "start given": self.options.start is not None,
                "stages": subject.stages(self.batches),
            }
            return self.record._replace(pools={}, batches=0).written(about)

        heard = self._heard(begin)
        subject, stages = subjects[0], _agreed([about for _, about in heard])
        self._take_over([record for record, _ in heard])
        left = [stage for stage in stages if not all(name in self.record.done for name in stage)]
        with self._bar(len(left)) as advance:
            for stage in left:
                self._pool(subject, stage, advance)
        return subject, self.record

    def close(self) -> None:
        """The statistics are where they belong, and no file is needed any more."""
        if self.file:
            self.file.delete()

    def _open_file(self, subject: Subject) -> None:
        path, comm = self.options.checkpoint, self.options.comm
        if path is None:
            return
        start = None if self.options.start is None else int(self.options.start)
        about = {"subject": subject.identity, "weights": subject.digest(), "start": start}
        if comm is not None:
            group = communicator(comm)
            about["rank"] = f"{group.rank} of {group.size}"
            path = f"{path}.{group.rank}"
        self.file = RecordFile(path, about)
        self.record = self.file.read()

    def _heard(self, make: Callable[[], Written]) -> list[tuple[Record, dict[str, Any]]]:
        """What each rank makes, in rank order."""
        comm = self.options.comm
        if comm is None:
            return [Record.read(make())]
        return [Record.read(of_message(said)) for said in exchanged(comm, "recalibrate", lambda: as_message(make()))]

    def _take_over(self, records: Sequence[Record]) -> None:
        """What any rank's file has of all ranks; where that is more than this one's has, its pools are of the past."""
        done = {name: moments for record in records for name, moments in record.done.items()}
        if done.keys() != self.record.done.keys():
            self.record = Record(done)
        self.record = self.record._replace(all_batches=max(record.all_batches for record in records))

    def _pool(self, subject: Subject, stage: Stage, advance: Callable[[], None]) -> None:
        """One pass, and what all ranks have pooled in it."""

        def take() -> Written:
            try:
                with subject.observing(stage, self.record.done) as observe:
                    for batch in self._batches(advance):
                        pools = Pools(self.record.pools, self.options.start or 0)
                        observe(batch, pools)
                        batches = self.record.batches + 1
                        self.record = self.record._replace(pools=pools.found, batches=batches)
                        if self.file and not batches % self.options.checkpoint_every:
                            self.file.write(self.record)
            finally:
                if self.file:
                    self.file.write(self.record)
            return self.record._replace(done={}).written({})

        records = [record for record, _ in self._heard(take)]
        batches = sum(record.batches for record in records)
        if not batches:
            raise ValueError(message("batches", "hold a batch", "none"))
        in_order = self.options.start is not None
        pooled = {
            name: _joined([record.pools[name] for record in records if name in record.pools], in_order)
            for name in dict.fromkeys(name for record in records for name in record.pools)
        }
        self.record = Record({**self.record.done, **pooled}, all_batches=batches)
        if self.file:
            self.file.write(self.record)

    def _batches(self, advance: Callable[[], None]) -> Iterator[Any]:
        """Those that no file has."""
        iterator, covered = iter(self.batches), self.record.batches
        for _ in range(covered):
            if next(iterator, _NONE) is _NONE:
                rule = f"be those of the checkpoint, which is of {covered}"
                raise ValueError(message("batches", rule, "fewer"))
            advance()
        for batch in iterator:
            yield batch
            advance()

    @contextmanager
    def _bar(self, passes: int) -> Iterator[Callable[[], None]]:
        """What to call after each batch."""
        comm, progress = self.options.comm, self.options.progress
        shown = sys.stderr.isatty() if progress is None else progress
        tqdm = bar_of(progress) if shown and (comm is None or not communicator(comm).rank) else None
        if tqdm is None:
            yield _nothing
            return
        total = passes * len(self.batches) if isinstance(self.batches, Sized) else None
        with tqdm(total=total, desc="recalibrating", unit="batch") as bar:
            yield bar.update


def bar_of(progress: bool | None) -> Any:
    """tqdm's bar; None where it is not installed, which is an error if a bar was asked for."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        if not progress:
            return None
        text = f"progress=True needs tqdm ({error}). Install it with: pip install tqdm"
        raise ImportError(f"recalibrate: {text}") from error
    return tqdm


_NONE = object()


def _nothing() -> None:
    """No bar."""


def _agreed(abouts: Sequence[dict[str, Any]]) -> list[Stage]:
    """The stages that the ranks with batches know; an error on all ranks where they differ."""
    for name in ("subject", "start given"):
        if any(about[name] != abouts[0][name] for about in abouts):
            got = "; ".join(f"{about[name]} on rank {rank}" for rank, about in enumerate(abouts))
            raise CollectiveMismatch(message("ranks", f"agree on the {name}", got))
    known = [about["stages"] for about in abouts if about["stages"]]
    if any(stages != known[0] for stages in known):
        raise CollectiveMismatch(message("ranks", "call the layers of a model in the same order", known))
    if not known:
        raise ValueError(message("batches", "hold a batch", "none"))
    return [tuple(stage) for stage in known[0]]


def _joined(ranks: Sequence[tuple[Moments, ...]], in_order: bool) -> Moments:
    """Moments of all calls of a layer, on all ranks."""
    calls = zip_longest(*ranks)
    return reduce(add, (_of_call([part for part in parts if part is not None], in_order) for parts in calls))


def _of_call(parts: Sequence[Moments], in_order: bool) -> Moments:
    if not in_order:
        return reduce(add, parts)
    for before, after in pairwise(parts):
        if before.stop != after.start:
            rule = "be the global index of each rank's first sample, in the order of the ranks"
            got = ", ".join(f"samples [{part.start}, {part.stop})" for part in parts)
            raise ValueError(message("start", rule, got))
    return reduce(Moments.merge, parts)
