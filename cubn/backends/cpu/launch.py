"""Launches: kernels that run one after the other on the same parameter block, in one native call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn._arrays.numpy import address_of
from cubn._kept import kept
from cubn._types import ITEMSIZE, Operand
from cubn.backends.cpu import pool
from cubn.backends.cpu.words import HAS_TEAM, WORD

ALIGNMENT = 128
"""Bytes: a cache line, and its neighbour that is fetched along."""

WORKSPACE = 1 << 20
"""Bytes of workspace that a thread keeps for its next call."""

POSITION_TABLES = 256 << 20
"""Bytes of those that are kept; eight for each position."""

Arrays = tuple[NDArray[Any], ...]


class Workspace(NamedTuple):
    """Memory that a call writes for itself. Whoever uses its address holds this: a signal handler, which may run cubn
    between any two bytecodes, may give the thread another.
    """

    address: int
    size: int
    has_team: bool  # of an OpenMP runtime's threads: the word before the address says so
    memory: NDArray[np.uint8] | None = None


class _Thread(threading.local):
    workspace = Workspace(0, 0, False)


_thread = _Thread()


def _another(size: int, has_team: bool) -> Workspace:
    memory = np.empty(size + 2 * ALIGNMENT, np.uint8)
    address = (address_of(memory) // ALIGNMENT + 1) * ALIGNMENT
    at = address - address_of(memory) + HAS_TEAM
    memory[at : at + WORD].view(np.int64)[0] = has_team
    workspace = Workspace(address, size, has_team, memory)
    if size <= WORKSPACE:
        _thread.workspace = workspace
    return workspace


class Launch:
    """A program, and what it needs."""

    __slots__ = ("helpers", "keeps", "nbytes", "run", "size")

    def __init__(self, program: pool.Program, size: int, tabulated: Collection[Operand], keeps: Arrays) -> None:
        run = pool.prepare(program)
        self.run: Callable[..., None] = Tabulated(run, tabulated) if tabulated else run
        self.helpers = program.helpers
        self.size = size  # of the workspace
        self.keeps = keeps  # which the program has addresses of
        self.nbytes = program.nbytes + sum(array.nbytes for array in keeps)

    def workspace(self) -> Workspace:
        """To be held while `run`, which is given its address first, is running; other threads are there then."""
        has_team = self.helpers > 0 and pool.ask_for(self.helpers)
        workspace = _thread.workspace
        if workspace.size >= self.size and workspace.has_team >= has_team:
            return workspace
        return _another(self.size, has_team)

    def __call__(self, statistics: int, *arguments: float) -> None:
        workspace = self.workspace()
        self.run(workspace.address, statistics, *arguments)


class Tabulated:
    """A program whose first arguments are position tables. They are looked up anew each time, and so their memory is
    bounded.
    """

    __slots__ = ("operands", "run")

    def __init__(self, run: Callable[..., None], operands: Collection[Operand]) -> None:
        self.run, self.operands = run, operands

    def __call__(self, workspace: int, statistics: int, *arguments: float) -> None:
        tables = [position_table(operand) for operand in self.operands]
        self.run(workspace, statistics, *map(address_of, tables), *arguments)


def position_table(operand: Operand) -> NDArray[np.int64]:
    """Where each position of an operand of any strides is, in bytes."""
    size = ITEMSIZE[operand.dtype]
    return _positions(operand.position_shape, tuple(stride * size for stride in operand.position_strides))


@kept(POSITION_TABLES)
def _positions(shape: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[np.int64]:
    offsets = np.zeros((), np.int64)
    for extent, stride in zip(shape, strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(extent, dtype=np.int64) * stride)
    return offsets.reshape(-1)
