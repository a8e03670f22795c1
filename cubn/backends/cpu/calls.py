"""Operations that are prepared: called with addresses, they run in one native call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn import _nodes
from cubn._arrays.numpy import DATA, address_of, read_address
from cubn._types import Extents, Nodes, Statistics
from cubn.backends.cpu import relu_mask
from cubn.backends.cpu.assemble import Copies
from cubn.backends.cpu.launch import Launch
from cubn.backends.cpu.plan import ReductionPlan, WordLayout
from cubn.backends.cpu.relu_mask import ReluMask

Doubles = NDArray[np.float64]
Sums = tuple[Doubles, Doubles]

_new = tuple.__new__  # of a NamedTuple, in a third of the time


class Prepared:
    """A launch that is called in a way of its own."""

    __slots__ = ("_launch",)

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    @property
    def nbytes(self) -> int:
        return self._launch.nbytes


class PreparedForward(Prepared):
    """See `cubn.backends.protocol`."""

    __slots__ = ()

    def __call__(
        self, x: int, residual: int, y: int, mask: int, gamma: int, beta: int, mean: int, var: int, eps: float, /
    ) -> None:
        launch = self._launch
        workspace = launch.workspace()
        launch.run(workspace.address, 0, x, residual, y, mask, gamma, beta, mean, var, eps)


def forward_of_nothing(*_: float) -> None:
    """A batch without elements."""


class PreparedTrain(Prepared):
    """See `cubn.backends.protocol`."""

    __slots__ = ("_beta", "_channels", "_extents", "_gamma", "_size", "_words")

    def __init__(self, launch: Launch, extents: Extents, copies: Copies, words: WordLayout | None) -> None:
        super().__init__(launch)
        self._extents, self._words = extents, words
        self._channels, self._size = extents.C, Statistics.size(extents.C)
        self._gamma, self._beta = copies

    def __call__(
        self,
        x: int,
        residual: int,
        y: int,
        mask: int,
        gamma: int,
        beta: int,
        eps: float,
        old_mean: int = 0,
        old_var: int = 0,
        new_mean: int = 0,
        new_var: int = 0,
        tracked: int = 0,
        skipped: int = 0,
        momentum: float | None = 0.0,
        /,
    ) -> tuple[Statistics, ReluMask | None]:
        memory = np.zeros(self._size)  # not `empty`: what has no meaning is equal every time, too
        address = read_address(id(memory) + DATA).value
        passed = relu_mask.new(self._extents, self._words) if self._words else None
        launch = self._launch
        workspace = launch.workspace()
        launch.run(
            workspace.address,
            address,
            x,
            residual,
            y,
            mask,
            passed.address if passed else 0,
            gamma,
            beta,
            old_mean,
            old_var,
            new_mean,
            new_var,
            tracked,
            skipped,
            momentum is None,
            eps,
            0.0 if momentum is None else momentum,
        )
        found = _new(Statistics, (memory, address, self._channels, self._gamma, self._beta, None))
        return found, passed


class PreparedFrozen(PreparedTrain):
    """See `cubn.backends.protocol`."""

    __slots__ = ()

    def __call__(  # type: ignore[override]
        self, x: int, residual: int, y: int, mask: int, gamma: int, beta: int, mean: int, var: int, eps: float, /
    ) -> tuple[Statistics, ReluMask | None]:
        memory = np.zeros(self._size)
        address = read_address(id(memory) + DATA).value
        passed = relu_mask.new(self._extents, self._words) if self._words else None
        launch, at_mask = self._launch, passed.address if passed else 0
        workspace = launch.workspace()
        launch.run(workspace.address, address, x, residual, y, mask, at_mask, gamma, beta, mean, var, eps)
        return _new(Statistics, (memory, address, self._channels, self._gamma, self._beta, None)), passed


class PreparedBackward(Prepared):
    """See `cubn.backends.protocol`."""

    __slots__ = ("_channels",)

    def __init__(self, launch: Launch, channels: int) -> None:
        super().__init__(launch)
        self._channels = channels

    def __call__(
        self,
        x: int,
        dy: int,
        dx: int,
        dresidual: int,
        mask: int,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        dgamma: int,
        dbeta: int,
        wants_sums: bool = False,
        /,
    ) -> Sums | None:
        sums = np.empty((2, self._channels))
        first = read_address(id(sums) + DATA).value
        launch = self._launch
        workspace = launch.workspace()
        launch.run(
            workspace.address,
            statistics.address,
            x,
            dy,
            dx,
            dresidual,
            mask,
            relu_mask.address if relu_mask else 0,
            first,
            first + 8 * self._channels,
            dgamma,
            dbeta,
        )
        return (sums[0], sums[1]) if wants_sums else None


class BackwardOfNothing:
    """A batch without elements, whose sums are 0."""

    __slots__ = ("_channels", "_gradients")

    def __init__(self, channels: int, gradients: Launch | None) -> None:
        self._channels, self._gradients = channels, gradients

    def __call__(
        self,
        x: int,
        dy: int,
        dx: int,
        dresidual: int,
        mask: int,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        dgamma: int,
        dbeta: int,
        wants_sums: bool = False,
        /,
    ) -> Sums:
        first, second = np.zeros((2, self._channels))
        if self._gradients:
            self._gradients(statistics.address, address_of(first), address_of(second), dgamma, dbeta)
        return first, second


class PreparedNormalize:
    """See `cubn.backends.protocol`."""

    __slots__ = ("_extents", "_launch", "_words")

    def __init__(self, launch: Launch | None, extents: Extents, words: WordLayout | None) -> None:
        self._launch, self._extents, self._words = launch, extents, words

    @property
    def nbytes(self) -> int:
        return self._launch.nbytes if self._launch else 0

    def __call__(
        self, x: int, residual: int, y: int, mask: int, statistics: Statistics, gamma: int, beta: int, /
    ) -> ReluMask | None:
        passed = relu_mask.new(self._extents, self._words) if self._words else None
        if self._launch:
            at = passed.address if passed else 0
            self._launch(statistics.address, x, residual, y, mask, at, gamma, beta)
        return passed


class PreparedUpdate:
    """See `cubn.backends.protocol`."""

    __slots__ = ("_launch",)

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def __call__(
        self,
        statistics: Statistics,
        old_mean: int,
        old_var: int,
        new_mean: int,
        new_var: int,
        tracked: int,
        skipped: int,
        momentum: float | None,
        /,
    ) -> None:
        moved = (old_mean, old_var, new_mean, new_var, tracked, skipped)
        self._launch(statistics.address, *moved, momentum is None, 0.0 if momentum is None else momentum)


class PreparedMoments:
    """See `cubn.backends.protocol`."""

    __slots__ = ("_channels", "_cut", "_launch")

    def __init__(self, launch: Launch | None, cut: ReductionPlan | None, channels: int) -> None:
        self._launch, self._cut, self._channels = launch, cut, channels

    @property
    def nbytes(self) -> int:
        return self._launch.nbytes if self._launch else 0

    def __call__(self, x: int, mask: int, /) -> Nodes:
        if self._launch is None or self._cut is None:
            return no_nodes(self._channels)
        return node_rows(self._launch, self._cut, self._channels, 0, x, mask)


def node_rows(launch: Launch, cut: ReductionPlan, C: int, *given: int) -> Nodes:
    """What a launch leaves, as a table."""
    rows = len(cut.table)
    if rows == 1:  # a table as it is
        table = np.empty((1, 2 * C + 1))
        at = address_of(table)
        launch(*given, at, at + 8, at + 8 * (C + 1))
        return Nodes(cut.blocks, table)
    nodes: tuple[NDArray[Any], ...] = np.empty(rows, np.int64), np.empty((rows, C)), np.empty((rows, C))
    launch(*given, *map(address_of, nodes))
    return _nodes.joined(cut.blocks, *(part[list(cut.kept)] if len(cut.kept) < rows else part for part in nodes))


def no_nodes(C: int) -> Nodes:
    """Of a batch without elements."""
    return Nodes((), np.zeros((0, 2 * C + 1)))
