"""Ranks that are threads of one process: for tests, and for learning without an MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cubn.sync.transport import Bytes, Communicator

T = TypeVar("T")


class RankEnded(RuntimeError):
    """Another rank ended, so that what this one waits for will never come."""


class _Board:
    """Where the threads of a group leave their records."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.records: dict[int, dict[int, Bytes]] = {}  # number of the gather -> rank -> record
        self.read: dict[int, int] = {}  # number of the gather -> how many ranks have read it
        self.ended: set[int] = set()


class _Pending(NamedTuple):
    board: _Board
    number: int
    received: Bytes

    def wait(self) -> None:
        board, number, received = self
        with board.changed:
            records = board.records[number]
            board.changed.wait_for(lambda: len(records) == board.size or board.ended - set(records))
            if len(records) < board.size:
                raise RankEnded(f"ranks {sorted(board.ended - set(records))} ended before gather {number}")
            board.read[number] = board.read.get(number, 0) + 1
            if board.read[number] == board.size:
                del board.records[number], board.read[number]
        np.concatenate([records[rank] for rank in range(board.size)], out=received)


class ThreadCommunicator(Communicator):
    """One thread among those of `communicators`."""

    def __init__(self, rank: int, board: _Board) -> None:
        super().__init__(rank, board.size)
        self._board = board
        self._gathers = 0

    def gather(self, record: Bytes, received: Bytes, sizes: Sequence[int]) -> _Pending:
        number = self._gathers
        self._gathers += 1
        with self._board.changed:
            self._board.records.setdefault(number, {})[self.rank] = record.copy()
            self._board.changed.notify_all()
        return _Pending(self._board, number, received)

    def lane(self, sizes: tuple[int, ...], on_device: bool, agreed: bool) -> ThreadCommunicator:
        """A record is copied whole, whatever its size was thought to be."""
        return self

    def end(self) -> None:
        """Say that this rank gathers no more; those who wait for it get `RankEnded`."""
        with self._board.changed:
            self._board.ended.add(self.rank)
            self._board.changed.notify_all()


def communicators(size: int) -> list[ThreadCommunicator]:
    """One communicator for each of `size` threads, in rank order."""
    board = _Board(size)
    return [ThreadCommunicator(rank, board) for rank in range(size)]


def run(size: int, function: Callable[[Any], T]) -> list[T]:
    """Call function(comm) in `size` threads, one for each rank.

    Parameters
    ----------
    size : int
        How many ranks.
    function : callable
        Gets the rank's communicator.

    Returns
    -------
    list
        What the ranks returned, in rank order.

    Raises
    ------
    BaseExceptionGroup
        Of what ranks raised; an ExceptionGroup where all of that were Exceptions.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def call(comm: ThreadCommunicator) -> None:
        try:
            results[comm.rank] = function(comm)
        except BaseException as error:
            error.add_note(f"on rank {comm.rank}")
            errors.append(error)
        finally:
            comm.end()

    threads = [threading.Thread(target=call, args=(comm,)) for comm in communicators(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise BaseExceptionGroup("ranks failed", errors)
    return [results[rank] for rank in range(size)]
