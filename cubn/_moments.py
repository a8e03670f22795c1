"""Moments as values: merged, pooled, written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays, _nodes, reference
from cubn._arguments import as_int, on_host, refusal
from cubn._entries import MOST, check_not_negative, checked_entries
from cubn._floating_point import default_floating_point
from cubn._state.holding import NO_STATISTICS
from cubn._state.options import checked_weight
from cubn._tree import Block
from cubn._types import Nodes, Statistics
from cubn.backends.protocol import Backend
from cubn.errors import message, reporting_as
from cubn.state import BatchNormState
from cubn.typing import SupportsDLPack

Float64 = NDArray[np.float64]


class Moments:
    """Count, mean and sum of squared deviations of each channel, over a contiguous range of samples.

    Made by `moments`; neighbouring ranges `merge` into one. However the samples were cut into ranges, the merged result
    has the same bits: besides the totals, Moments hold one node of the canonical tree for each maximal aligned
    power-of-two block of the range, about 2 log2(samples) nodes of 16 bytes per channel.

    Where samples have no order, `a + b` pools Moments of any origin, and `from_statistics` makes them of numbers that
    somebody else took. These are not `exact`: they stand for no range, and their bits depend on the order of additions.

    Attributes
    ----------
    exact : bool
        Whether these are the nodes of a range of samples.
    start, stop : int
        The range [start, stop) of global sample indices; 0 and 0 where they are not exact.
    num_features : int
        Channels, C.
    count : numpy.int64
        Values per channel; with a mask, those it lets through. 0 for moments of nothing.
    mean, m2 : numpy.ndarray of float64, shape (C,)
        Mean, and sum of (x - mean)**2; 0 for moments of nothing.

    Notes
    -----
    Immutable and picklable; in NumPy whatever the library of x.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.arange(24.0).reshape(4, 2, 3)
    >>> cubn.moments(x[:1]).merge(cubn.moments(x[1:], start=1))
    Moments(samples=[0, 4), num_features=2, count=12)
    >>> cubn.moments(x[:1]) + cubn.moments(x[1:])
    Moments(num_features=2, count=12, exact=False)
    """

    # Bytes, for nobody can change or free them through an array made of them.
    __slots__ = ("_blocks", "_count", "_m2", "_mean", "_statistics", "_table", "exact", "start", "stop")
    exact: bool
    start: int
    stop: int
    _blocks: tuple[Block, ...]
    _table: bytes
    _count: int
    _mean: bytes
    _m2: bytes
    _statistics: tuple[float, bytes, dict[Backend, Statistics]] | None  # for an eps, and where it was needed

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        raise TypeError("Moments: cubn.moments(x), Moments.from_statistics and Moments.from_dict make them.")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("Moments: no class can be derived from them.")

    @classmethod
    def _of(cls, start: int, stop: int, nodes: Nodes, *, exact: bool = True) -> Self:
        """Moments of checked nodes; of a single one for no range, where they are not exact."""
        table = nodes.table.tobytes()
        if len(nodes.blocks) == 1:  # which is the root
            size = 4 * (nodes.table.shape[1] - 1)
            count, mean, m2 = (
                int.from_bytes(table[:8], sys.byteorder, signed=True),
                table[8 : 8 + size],
                table[8 + size :],
            )
        else:
            values, *totals = _nodes.root(nodes)
            count, (mean, m2) = int(values), (total.tobytes() for total in totals)
        self = object.__new__(cls)
        for keep, value in zip(_KEEP, (exact, start, stop, nodes.blocks, table, count, mean, m2, None), strict=True):
            keep(self, value)
        return self

    @classmethod
    @default_floating_point
    @reporting_as("from_statistics")
    def from_statistics(cls, count: int, mean: SupportsDLPack, var: SupportsDLPack) -> Self:
        """Moments of numbers that somebody else took.

        Parameters
        ----------
        count : int
            Values per channel; at least 1.
        mean, var : array of shape (C,), any library
            float16, bfloat16, float32 or float64; var is m2 / count. Of an unbiased variance, give
            `var * (count - 1) / count`.

        Returns
        -------
        Moments
            Not `exact`.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit; the message says what is asked for.

        Examples
        --------
        >>> import numpy as np, cubn
        >>> old = cubn.Moments.from_statistics(1000, np.zeros(2), np.full(2, 4.0))
        >>> (old + cubn.moments(np.ones((500, 2)))).std()
        array([1.69967317, 1.69967317])
        """
        values = as_int(count, "count")
        if not 0 < values < MOST:
            raise ValueError(message("count", "be at least 1 and less than 2**62", values))
        described = [_arrays.describe(array, name, detach=True) for name, array in (("mean", mean), ("var", var))]
        shape = described[0].shape
        for name, array in zip(("mean", "var"), described, strict=True):
            if len(shape) != 1 or not shape[0] or array.shape != shape:
                raise ValueError(refusal(name, "have shape (C,), one value per channel, as the other", array))
        centre, variance = (on_host(array).astype(np.float64) for array in described)
        check_not_negative("var", variance)
        with np.errstate(over="ignore"):
            return cls._pooled((np.array(values), centre, variance * values))

    @classmethod
    def _pooled(cls, node: reference.Node) -> Self:
        """Moments of no range."""
        count, mean, m2 = node
        return cls._of(0, 0, _nodes.joined(((0, 1),), np.array([count]), mean[None], m2[None]), exact=False)

    @classmethod
    @reporting_as("from_dict")
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """The Moments that `to_dict` wrote down.

        Parameters
        ----------
        d : mapping
            As from `to_dict`, or from what stored it.

        Returns
        -------
        Moments

        Raises
        ------
        KeyError
            If an entry is missing.
        TypeError, ValueError
            If an entry does not fit.
        """
        entries = checked_entries(d)
        return cls._of(entries.start, entries.stop, _nodes.merge(entries.nodes), exact=entries.exact)

    def to_dict(self) -> dict[str, Any]:
        """Everything that Moments hold, as plain numbers and NumPy arrays: `numpy.savez` stores it without pickle.

        Returns
        -------
        dict
            start, stop, exact; blocks, of int64 and shape (rows, 2), the samples of each node; count, of int64 and
            shape (rows,), mean and m2, of float64 and shape (rows, C).

        Examples
        --------
        >>> import io, numpy as np, cubn
        >>> file, taken = io.BytesIO(), cubn.moments(np.ones((6, 4)))
        >>> np.savez(file, **taken.to_dict())
        >>> _ = file.seek(0)
        >>> cubn.Moments.from_dict(np.load(file))
        Moments(samples=[0, 6), num_features=4, count=6)
        """
        nodes = self._nodes
        return {
            "start": self.start,
            "stop": self.stop,
            "exact": self.exact,
            "blocks": np.array(nodes.blocks, np.int64).reshape(-1, 2),
            "count": nodes.count.copy(),
            "mean": nodes.first.copy(),
            "m2": nodes.second.copy(),
        }

    def _place(self, eps: float, place: Backend) -> Statistics:
        """What normalisation needs of these, where a backend can use it, without gamma and beta."""
        made = self._statistics
        if made is None or made[0] != eps:
            made = eps, _nodes.statistics(self._count, self.mean, self.m2, eps).tobytes(), {}
            _KEEP[-1](self, made)
        placed, device = made[2].get(place), place.device
        is_captured = device is not None and device.capturing()
        if placed is None:
            placed = place.place_statistics(np.frombuffer(made[1]), self.num_features)
            if not is_captured:  # what a graph copies belongs to the graph
                made[2][place] = placed
        elif device is not None and is_captured:  # replays read it, and these may be gone by then
            device.hold(placed.memory)
        return placed

    @property
    def num_features(self) -> int:
        return len(self._mean) // 8

    @property
    def count(self) -> np.int64:
        return np.int64(self._count)

    @property
    def mean(self) -> Float64:
        return np.frombuffer(self._mean)

    @property
    def m2(self) -> Float64:
        return np.frombuffer(self._m2)

    @property
    def _nodes(self) -> Nodes:
        table = np.frombuffer(self._table).reshape(len(self._blocks), 2 * self.num_features + 1)
        return Nodes(self._blocks, table)

    def var(self) -> Float64:
        """Variance m2 / count, the one that normalises.

        Returns
        -------
        numpy.ndarray of float64, shape (C,)
            NaN for moments of nothing.
        """
        return self._m2_over(self._count)

    def var_unbiased(self) -> Float64:
        """Variance m2 / (count - 1), the one that running_var averages by default.

        Returns
        -------
        numpy.ndarray of float64, shape (C,)
            NaN below two values.
        """
        return self._m2_over(max(self._count - 1, 0))

    @default_floating_point
    def std(self) -> Float64:
        """Standard deviation, the square root of `var()`.

        Returns
        -------
        numpy.ndarray of float64, shape (C,)
            NaN for moments of nothing.

        Examples
        --------
        >>> import numpy as np, cubn
        >>> cubn.moments(np.array([[1.0, 5.0], [3.0, 5.0]])).std()
        array([1., 0.])
        """
        return np.sqrt(self.var())

    @reporting_as("merge")
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
            If the ranges are not neighbours, the channels differ in number, or one of the two is not `exact`.
        """
        if not isinstance(other, Moments):
            raise TypeError(message("other", "be Moments", type(other).__name__))
        self._check_channels(other)
        if not (self.exact and other.exact):
            remedy = "Add Moments without a range: a + b."
            raise ValueError(message("other", "be of a range of samples, as these Moments", "exact=False", remedy))
        if self.stop == other.start:
            left, right = self, other
        elif other.stop == self.start:
            left, right = other, self
        else:
            rule = f"begin at sample {self.stop} or end at {self.start}, beside these Moments"
            remedy = (
                "Give `moments` the global index of its first sample as start, and merge neighbours; or, where samples "
                "have no order, add them: a + b."
            )
            raise ValueError(message("other", rule, f"[{other.start}, {other.stop})", remedy))
        parts = left._nodes, right._nodes
        nodes = Nodes(parts[0].blocks + parts[1].blocks, np.concatenate([part.table for part in parts]))
        return Moments._of(left.start, right.stop, _nodes.merge(nodes))

    @default_floating_point
    @reporting_as("+")
    def __add__(self, other: Moments) -> Moments:
        """Moments of the values of both, whatever their ranges (Chan, Golub & LeVeque 1979).

        The same formula as in `merge`, in the order in which they are added: a + b + c has other bits than a + (b + c),
        and the sum of a data set's parts other bits than `moments` of the whole. The result is not `exact`.

        Examples
        --------
        >>> import numpy as np, cubn
        >>> stream = (np.full((2, 1), value) for value in (1.0, 2.0, 3.0))
        >>> sum(cubn.moments(x) for x in stream).mean
        array([2.])
        """
        if not isinstance(other, Moments):
            return NotImplemented
        self._check_channels(other)
        if self._count + other._count >= MOST:
            raise ValueError(message("other", "leave fewer than 2**62 values in all", int(other.count)))
        a, b = ((np.array(part._count), part.mean, part.m2) for part in (self, other))
        return Moments._pooled(reference.merge(a, b))

    def __radd__(self, other: int) -> Moments:
        """0 + Moments, with which `sum` begins."""
        return self if type(other) is int and other == 0 else NotImplemented

    @default_floating_point
    @reporting_as("blend")
    def blend(self, other: Moments | BatchNormState, weight: float) -> Moments:
        """A mix of these statistics and others, to normalise by: test-time adaptation, in the open.

        mean = (1 - weight) * other's mean + weight * this mean, and the variance likewise.

        Parameters
        ----------
        other : Moments or BatchNormState
            What training left: a state's running mean and running variance, which is read and not changed; or Moments
            of a data set, of which the variance is `var()`.
        weight : float
            Of these Moments, 0 to 1. For n samples at hand, n / (N0 + n): then `other` counts as N0 samples. At 0 the
            result is other's statistics, at 1 these, whatever the ones without weight hold.

        Returns
        -------
        Moments
            Of this count; not `exact`. Their m2 is the variance times the count, so that `var()` may be off by the last
            bit.

        Raises
        ------
        TypeError
            If other is neither, or weight is no number.
        ValueError
            If weight is not from 0 to 1, these are moments of nothing, or other has none, no running statistics, or
            another number of channels.

        Notes
        -----
        In float64. The means' distance is no part of the variance, as it is in `a + b`: this is no pooling, and nothing
        to `update` a state with. Reads running statistics on a CUDA device, and waits for that.

        References
        ----------
        Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation",
        https://arxiv.org/abs/2006.16971
        Nado et al. 2020, "Evaluating prediction-time batch normalization for robustness under covariate shift",
        https://arxiv.org/abs/2006.10963

        Examples
        --------
        >>> import numpy as np, cubn
        >>> state = cubn.BatchNormState(2)
        >>> x = np.random.default_rng(0).normal(3, 2, (8, 2)).astype(np.float32)
        >>> blended = cubn.moments(x).blend(state, 8 / (16 + 8))
        >>> y = cubn.normalize(x, blended, gamma=state.gamma, beta=state.beta, eps=state.eps)
        >>> np.allclose(blended.mean, cubn.moments(x).mean / 3)
        True
        """
        share = checked_weight(weight)
        if not self._count:
            rule = "be of at least one value per channel"
            raise ValueError(message("moments", rule, 0))
        mean, var = self._of_other(other)
        with np.errstate(all="ignore"):
            centre, variance = (_mixed(a, b, share) for a, b in ((mean, self.mean), (var, self.var())))
            return Moments._pooled((np.array(self._count), centre, variance * self._count))

    def _of_other(self, other: Any) -> tuple[Float64, Float64]:
        """Mean and variance of what Moments are blended with."""
        if not isinstance(other, (Moments, BatchNormState)):
            raise TypeError(message("other", "be Moments or a BatchNormState", type(other).__name__))
        self._check_channels(other)
        if isinstance(other, Moments):
            if not other._count:
                raise ValueError(message("other", "be of at least one value per channel", 0))
            return other.mean, other.var()
        running = other._running_on_host()
        if running is None:
            remedy = "Make the state with track=True."
            raise ValueError(message("other", "have running statistics", NO_STATISTICS, remedy))
        return running

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Moments: {name} cannot be changed. Take, merge or add Moments for new ones.")

    def __delattr__(self, name: str) -> NoReturn:
        self.__setattr__(name, None)

    def __reduce__(self) -> tuple[Callable[..., Moments], tuple[dict[str, Any]]]:
        return Moments.from_dict, (self.to_dict(),)

    def __copy__(self) -> Moments:
        return self

    def __deepcopy__(self, memo: Any) -> Moments:
        return self

    def __repr__(self) -> str:
        of = f"samples=[{self.start}, {self.stop}), " if self.exact else ""
        return (
            f"Moments({of}num_features={self.num_features}, count={self._count}{'' if self.exact else ', exact=False'})"
        )

    @default_floating_point
    def _m2_over(self, count: int) -> Float64:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.m2 / np.float64(count or np.nan)

    def _check_channels(self, other: Moments | BatchNormState) -> None:
        if other.num_features != self.num_features:
            rule = f"have {self.num_features} channels, as these Moments have"
            raise ValueError(message("other", rule, other.num_features))


def _mixed(other: Float64, own: Float64, share: float) -> Float64:
    """(1 - share) * other + share * own; one of them alone where the other has no weight."""
    if share in (0, 1):
        return own if share else other
    return (1 - share) * other + share * own


_KEEP: tuple[Callable[[Moments, Any], None], ...] = tuple(
    Moments.__dict__[name].__set__
    for name in ("exact", "start", "stop", "_blocks", "_table", "_count", "_mean", "_m2", "_statistics")
)
"""How each attribute is given to new Moments; nothing else may."""
