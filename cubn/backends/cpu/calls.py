"""Operations that are prepared: called with addresses, they run in one native call."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cubn._arrays.numpy import DATA, address_of, read_address
from cubn._types import Extents, Statistics
from cubn.backends.cpu import relu_mask
from cubn.backends.cpu.assemble import Copies
from cubn.backends.cpu.launch import Launch
from cubn.backends.cpu.plan import WordLayout
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
        memory = np.empty(self._size)
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
        found = _new(Statistics, (memory, address, self._channels, self._gamma, self._beta))
        return found, passed


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
        /,
    ) -> Sums:
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
        return sums[0], sums[1]


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
        /,
    ) -> Sums:
        first, second = np.zeros((2, self._channels))
        if self._gradients:
            self._gradients(statistics.address, address_of(first), address_of(second), dgamma, dbeta)
        return first, second
