"""Moments of a range of samples: taken, merged, and turned into running statistics."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn import _arguments, _nodes
from cubn._floating_point import default_floating_point
from cubn.backends import Arrays, Backend, Nodes, Statistics
from cubn.errors import message
from cubn.state import BatchNormState, checked_state
from cubn.sync import collective
from cubn.sync.collective import Shared, Terms, check_sizes

Float64 = NDArray[np.float64]


class Moments:
    """Count, mean and sum of squared deviations of each channel, over a contiguous range of samples.

    Made by `moments`; neighbouring ranges `merge` into one. However the samples were cut into ranges, the merged result
    has the same bits: besides the totals, Moments hold one node of the canonical tree for each maximal aligned
    power-of-two block of the range, about 2 log2(samples) nodes of 16 bytes per channel.

    Attributes
    ----------
    start, stop : int
        The range [start, stop) of global sample indices.
    num_features : int
        Channels, C.
    count : numpy.int64
        Values per channel; with a mask, those it lets through. 0 for moments of nothing.
    mean, m2 : numpy.ndarray of float64, shape (C,)
        Mean, and sum of (x - mean)**2; 0 for moments of nothing.

    Notes
    -----
    Immutable and picklable; in NumPy whatever the library of x.
    """

    __slots__ = ("_nodes", "_root", "start", "stop")

    def __init__(self, start: int, stop: int, nodes: Nodes) -> None:
        self.start = start
        self.stop = stop
        self._nodes = nodes
        self._root: tuple[Any, Float64, Float64] = _nodes.root(nodes)
        for values in self._root[1:]:
            values.flags.writeable = False

    @property
    def num_features(self) -> int:
        return int(self._nodes.first.shape[1])

    @property
    def count(self) -> np.int64:
        return np.int64(self._root[0])

    @property
    def mean(self) -> Float64:
        return self._root[1]

    @property
    def m2(self) -> Float64:
        return self._root[2]

    def var(self) -> Float64:
        """Variance m2 / count, the one that normalises.

        Returns
        -------
        numpy.ndarray of float64, shape (C,)
            NaN for moments of nothing.
        """
        return self._m2_over(self.count)

    def var_unbiased(self) -> Float64:
        """Variance m2 / (count - 1), the one that running_var averages.

        Returns
        -------
        numpy.ndarray of float64, shape (C,)
            NaN below two values.
        """
        return self._m2_over(max(self.count - 1, np.int64(0)))

    def merge(self, other: Moments) -> Moments:
        """Moments of two neighbouring ranges together (Chan, Golub & LeVeque 1979).

        With nodes a and b: d = mean_b - mean_a, mean = mean_a + d * count_b / count,
        m2 = m2_a + m2_b + d**2 * count_a * count_b / count, in the order of the canonical tree.

        Parameters
        ----------
        other : Moments
            The range that follows this one, or the one before it; of the same number of channels.

        Returns
        -------
        Moments
            Of the joint range; the bits are those of `moments` over the joint samples.

        Raises
        ------
        TypeError
            If other is not Moments.
        ValueError
            If the ranges are not neighbours, or the channels differ in number.
        """
        if not isinstance(other, Moments):
            raise TypeError(message("merge", "other", "be Moments", type(other).__name__))
        if other.num_features != self.num_features:
            rule = f"have {self.num_features} channels, as these Moments have"
            raise ValueError(message("merge", "other", rule, other.num_features))
        if self.stop == other.start:
            left, right = self, other
        elif other.stop == self.start:
            left, right = other, self
        else:
            rule = f"begin at sample {self.stop} or end at {self.start}, beside these Moments"
            remedy = "Give `moments` the global index of its first sample as start, and merge neighbours."
            raise ValueError(message("merge", "other", rule, f"[{other.start}, {other.stop})", remedy))
        parts = left._nodes, right._nodes
        nodes = Nodes(parts[0].blocks + parts[1].blocks, np.concatenate([part.table for part in parts]))
        return Moments(left.start, right.stop, _nodes.merge(nodes))

    def __repr__(self) -> str:
        return f"Moments(samples=[{self.start}, {self.stop}), num_features={self.num_features}, count={self.count})"

    @default_floating_point()
    def _m2_over(self, count: np.int64) -> Float64:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.m2 / np.float64(count or np.nan)


def moments(
    x: Any, *, channel_axis: int = 1, mask: Any = None, comm: Any = None, sizes: Any = None, start: int = 0
) -> Moments:
    """Count, mean and sum of squared deviations of each channel of x.

    mean = sum(x) / count and m2 = sum((x - mean)**2) over every axis but the channel's, present positions only.

    Parameters
    ----------
    x : array of any library, rank 2 or more; float16, bfloat16, float32 or float64
        Samples are its first axis that is not the channel's. Zero samples or positions give moments of nothing.
    channel_axis : int
        The channels' axis; may be negative.
    mask : bool array on x's device, optional
        True where a position is present. x's shape without the channel axis (or with 1 there), each extent full or 1.
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or cubn.sync.Communicator, optional
        The ranks that hold the batch in parts, in rank order; all of them call this.
    sizes : sequence of int, optional
        With `comm`, the samples of each rank, if known; see `forward_train`.
    start : int
        Global index of the first sample, where x is a part of a larger batch or data set; with `comm`, that of the
        first rank's first sample.

    Returns
    -------
    Moments
        Of samples [start, start + N); with `comm`, of the samples of all ranks, on each of them.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message says what is asked for.
    numpy.exceptions.AxisError
        If x has no such channel_axis.
    CollectiveMismatch
        With `comm`, on all ranks: if they do not do the same thing, or another one failed.

    Notes
    -----
    The same bits for every layout, number of threads and array library; cut into ranges and merged, too. Reads x once.
    """
    check_sizes("moments", sizes, comm)
    if comm is not None:
        make = partial(_Taking, x, channel_axis, mask, start)
        return collective.start("moments", comm, sizes, make).finish()
    taking = _Taking(x, channel_axis, mask, start)
    first = taking.terms.start
    return Moments(first, first + taking.terms.N, taking.on_host(taking.part(first)))


_MOST_SAMPLES = 1 << 62


class _Taking:
    """A `moments` whose arguments were checked."""

    def __init__(self, x: Any, channel_axis: int, mask: Any, start: int) -> None:
        self.source = source = _arguments.source("moments", x, channel_axis)
        self.mask = None if mask is None else _arguments.mask("moments", mask, source)
        first = _arguments.whole(start, "moments", "start")
        if not 0 <= first < _MOST_SAMPLES:
            rule = "be 0 or more and less than 2**62, a global sample index"
            raise ValueError(message("moments", "start", rule, first))
        self.backend = source.backend
        self.terms = Terms("moments", source.extents.C, source.extents.N, source.array.dtype, start=first)

    def part(self, start: int) -> Nodes:
        source = self.source
        return self.backend.moments(source.extents, Arrays(source.operand, mask=self.mask and self.mask.operand), start)

    def accept(self, values: int) -> None:
        """Any number of values has moments."""

    def finish(self, shared: Shared) -> Moments:
        blocks = shared.nodes.blocks
        start, stop = (blocks[0][0], blocks[-1][1]) if blocks else (self.terms.start,) * 2
        return Moments(start, stop, _nodes.merge(self.on_host(shared.nodes)))

    def on_host(self, nodes: Nodes) -> Nodes:
        return nodes._replace(table=self.backend.to_host(nodes.table))


def update(state: BatchNormState, moments: Moments) -> None:
    """Move a state's running statistics towards given moments.

    running = (1 - momentum) * running + momentum * value, for mean and unbiased variance; with `momentum=None`, the
    cumulative average. A channel whose moments or new values are not finite, or that has fewer than two values, stays
    as it was and is counted in `state.skipped`.

    Parameters
    ----------
    state : BatchNormState
        Updated in place; arrays of an immutable library are replaced by new ones.
    moments : Moments
        Of a batch, a micro-batch, several batches merged.

    Raises
    ------
    TypeError
        If moments are not Moments.
    ValueError
        If the state has no running statistics, cannot be written, or has another number of channels.

    Notes
    -----
    Computed in float64 and rounded once. Updates of one state from several threads take turns.
    """
    checked_state(state, "update")
    if not isinstance(moments, Moments):
        remedy = "Use cubn.moments(x) to take them."
        raise TypeError(message("update", "moments", "be Moments", type(moments).__name__, remedy))
    if moments.num_features != state.num_features:
        rule = f"have {state.num_features} channels, as the state has"
        raise ValueError(message("update", "moments", rule, moments.num_features))
    state._check_updatable("update")
    place = state._place("update")
    statistics = statistics_of(moments, state.eps, place)
    with state._moving("update") as running:
        place.update(statistics, running)


def statistics_of(moments: Moments, eps: float, place: Backend) -> Statistics:
    """What normalisation needs of Moments, where a backend can use it."""
    count, mean, m2 = (place.from_host(a) for a in (np.array(moments.count), moments.mean, moments.m2))
    return place.statistics(count, mean, m2, eps)
