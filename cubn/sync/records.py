"""The records ranks gather: tables of nodes, with a row for each aligned block of a rank's samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn._groups import Cut, blocks_of, rows_by_tree
from cubn._tree import Block
from cubn._types import BackendArray, Nodes
from cubn.backends.in_steps import below
from cubn.backends.protocol import Backend

Table = NDArray[np.float64]


class RecordLayout(NamedTuple):
    """How the records of all ranks lie, one below the other."""

    start: int
    """Global index of the first rank's first sample."""
    samples: tuple[int, ...]
    """Of each rank."""
    widths: tuple[int, ...]
    """Words of each operation's node, which stand side by side in a row; 0 where nodes are not gathered."""
    cut: Cut = Cut()

    @property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        """Of each rank."""
        return _blocks(self.start, self.samples, self.cut)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each rank's record."""
        row = 8 * sum(self.widths)
        return tuple(len(blocks) * row for blocks in self.blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and words of a row, of all records together."""
        return sum(map(len, self.blocks)), sum(self.widths)

    @property
    def order(self) -> tuple[int, ...] | None:
        """The rows of all records in the order of the trees; None where they have it."""
        return rows_by_tree(self.samples, self.cut) if self.cut.size else None

    def first(self, rank: int) -> int:
        """Global index of a rank's first sample."""
        return self.start + sum(self.samples[:rank])

    def block_sizes(self, rank: int) -> list[int]:
        """What of the blocks of a rank decides which nodes it computes."""
        return [hi - lo for lo, hi in self.blocks[rank]]


@lru_cache(32)  # few, since one grows with the number of ranks
def _blocks(start: int, samples: tuple[int, ...], cut: Cut) -> tuple[tuple[Block, ...], ...]:
    """The aligned blocks of each rank's samples; the first rank's begin at `start`."""
    N = sum(samples)
    return tuple(blocks_of(lo, hi, N, cut) for lo, hi in pairwise(accumulate(samples, initial=start)))


def pack(
    layout: RecordLayout, rank: int, nodes: Sequence[Nodes], backends: Sequence[Backend], on_device: bool
) -> BackendArray:
    """The record of a rank: the nodes of each operation, in host memory or left on the device."""
    rows = len(layout.blocks[rank])
    gathered = [each for each in zip(nodes, backends, layout.widths, strict=True) if each[2]]
    tables = [_table(*each, rows, on_device) for each in gathered]
    if len(tables) == 1:
        return tables[0]
    device = gathered[0][1].device if on_device else None
    return np.hstack(tables or [np.empty((0, 0))]) if device is None else device.beside(tables)


def _table(nodes: Nodes, backend: Backend, width: int, rows: int, on_device: bool) -> BackendArray:
    """The nodes' table where records are made; of zeros for samples without positions."""
    if not nodes.blocks:
        zeros = np.zeros((rows, width))
        return backend.from_host(zeros) if on_device else zeros
    return nodes.table if on_device else backend.to_host(nodes.table, backend.staging(nodes.table.shape))


def unpack(
    layout: RecordLayout, table: BackendArray, backends: Sequence[Backend], on_device: bool
) -> list[Nodes | None]:
    """The nodes of all ranks from their records, for each operation; None where they are not gathered."""
    blocks = tuple(chain.from_iterable(layout.blocks))
    if (order := layout.order) is not None:
        blocks = tuple(blocks[row] for row in order)
        table = below([table[row : row + 1] for row in order], backends[0]) if on_device else table[list(order)]
    nodes: list[Nodes | None] = []
    for backend, (lo, hi) in zip(backends, pairwise(accumulate(layout.widths, initial=0)), strict=True):
        columns = table[:, lo:hi]
        nodes.append(Nodes(blocks, columns if on_device else backend.from_host(columns)) if lo < hi else None)
    return nodes


def failed_record(layout: RecordLayout, rank: int) -> Table:
    """The record of a rank that failed after its header was out: its counts are below 0."""
    record = np.zeros((len(layout.blocks[rank]), sum(layout.widths)))
    record.view(np.int64)[:, :1] = -1
    return record


def failed_ranks(layout: RecordLayout, table: Table) -> list[int]:
    """The ranks whose records, in the table of all, are those of `failed_record`."""
    marked = table.view(np.int64)[:, 0] < 0
    if not marked.any():
        return []
    owners = np.repeat(np.arange(len(layout.samples)), [len(blocks) for blocks in layout.blocks])
    return list(map(int, np.unique(owners[marked])))
