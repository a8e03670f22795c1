"""What a training's running statistics were, step by step, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn.health.inferred import batches_between, rms_in_evaluation
from cubn.health.reading import Floats, Int64, Reading, Watched

VALUES = ("gamma", "running_mean", "running_var", "batch_mean", "batch_var", "eval_rms")
COUNTS = ("tracked", "skipped")

RECENT = 32
"""So many of the newest records are always there."""


class _Table:
    """Records one below the other, in memory of a fixed size."""

    def __init__(self, rows: int, channels: int, dtype: np.dtype[Any]) -> None:
        self.steps = np.empty(rows, np.int64)
        self.values = np.empty((rows, len(VALUES), channels), dtype)
        self.counts = np.empty((rows, len(COUNTS), channels), np.int64)
        self.used = 0

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        return self.steps, self.values, self.counts

    @property
    def is_full(self) -> bool:
        return self.used == len(self.steps)

    def append(self, step: int, values: Sequence[Floats], counts: Int64) -> None:
        """Rows of values, one after the other; as one array they would be copied twice."""
        self.steps[self.used] = step
        at = 0
        for rows in values:
            self.values[self.used, at : at + len(rows)] = rows
            at += len(rows)
        self.counts[self.used] = counts
        self.used += 1

    def keep(self, rows: slice) -> None:
        """Only these, moved to the front."""
        for array in self.arrays:
            kept = array[: self.used][rows]
            array[: len(kept)] = kept.copy()
        self.used = len(kept)


class _Series:
    """An attribute of a layer's history: a column of its tables' values or counts, one below the other."""

    def __init__(self, array: int, column: int | None = None) -> None:
        self._array, self._index = array, () if column is None else (slice(None), column)

    def __get__(self, layer: LayerHistory, owner: type) -> NDArray[Any]:
        parts = [table[self._array][self._index] for table in layer._tables]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class LayerHistory:
    """One layer's records, oldest first.

    Attributes
    ----------
    name : str
    eps : float
    momentum : float or None
        At the newest record; None for the cumulative average.
    may_see_inputs : bool
        Whether it is the first of several layers, and may be given raw inputs, of which some are constant.
    steps : int64 array of shape (T,)
        At which step each record was made.
    gamma, running_mean, running_var : array of shape (T, C)
        NaN for a gamma that could not be read, 1 for a layer without.
    batch_mean, batch_var : array of shape (T, C)
        Of the batches since the record before, averaged with the weights of the running statistics; NaN where there
        were none.
    eval_rms : array of shape (T, C)
        Root mean square that these batches would have if they were normalised by the running statistics instead of
        their own, by which it is 1 (less where eps matters); see `cubn.health.inferred.rms_in_evaluation`.
    tracked, skipped : int64 array of shape (T, C)
        Updates seen by then, and those of them that changed nothing.
    """

    steps = _Series(0)
    gamma, running_mean, running_var, batch_mean, batch_var, eval_rms = (_Series(1, i) for i in range(len(VALUES)))
    tracked, skipped = (_Series(2, i) for i in range(len(COUNTS)))

    def __init__(
        self,
        name: str,
        eps: float,
        momentum: float | None,
        tables: Sequence[tuple[NDArray[Any], ...]],
        may_see_inputs: bool = False,
    ) -> None:
        self.name, self.eps, self.momentum, self.may_see_inputs = name, eps, momentum, may_see_inputs
        self._tables = tables

    def __len__(self) -> int:
        return sum(len(steps) for steps, _, _ in self._tables)

    def last(self, records: int) -> LayerHistory:
        """The newest so many, of the recent ones: nothing is copied."""
        steps, values, counts = self._tables[-1]
        newest = steps[-records:], values[-records:], counts[-records:]
        return LayerHistory(self.name, self.eps, self.momentum, (newest,), self.may_see_inputs)

    @property
    def skipped_lately(self) -> NDArray[np.float64]:
        """Of each channel, the share of the updates in the recent records that changed nothing."""
        _, _, counts = self._tables[-1]
        tracked, skipped = counts[-1] - counts[0]
        share: NDArray[np.float64] = skipped / np.maximum(tracked, 1)
        return share


class History(Mapping[str, LayerHistory]):
    """The records of all layers, by name.

    The newest 32 to 64 are always there. Of those before, every `stride`-th: when their memory is full, every second
    one goes and the stride doubles. So they are evenly spaced over the whole training however long it is, with the
    first one, and the same in each run. A reservoir would leave gaps of all sizes, which trends are harder to read in.

    Parameters
    ----------
    layers : sequence of Watched
    dtype : numpy.dtype
        Of what is kept: float32, or float64 where running statistics are.
    memory : int
        Bytes for the older records.
    """

    def __init__(self, layers: Sequence[Watched], dtype: np.dtype[Any], memory: int) -> None:
        self.layers = tuple(layers)
        ends = np.cumsum([layer.num_features for layer in layers])
        self._slices = {
            layer.name: (layer, slice(int(end) - layer.num_features, int(end)))
            for layer, end in zip(layers, ends, strict=True)
        }
        channels = int(ends[-1])
        self._sizes = np.array([layer.num_features for layer in layers])
        self._starts = ends - self._sizes
        self.eps = np.repeat([layer.eps for layer in layers], self._sizes)
        each = channels * (len(VALUES) * dtype.itemsize + len(COUNTS) * 8)
        self._earlier = _Table(max(2, memory // each // 2 * 2), channels, dtype)
        self._recent = _Table(2 * RECENT, channels, dtype)
        self._last: Reading | None = None
        self.records = 0
        self.stride = 1

    @property
    def steps(self) -> Int64:
        """At which step each record was made."""
        return np.concatenate([table.steps[: table.used] for table in (self._earlier, self._recent)])

    @property
    def nbytes(self) -> int:
        """What it takes, full or not."""
        return sum(array.nbytes for table in (self._earlier, self._recent) for array in table.arrays)

    def newest(self, name: str) -> NDArray[Any]:
        """One of `VALUES` or `COUNTS` in the newest record, of all layers, their channels one after the other."""
        return self._at(self._recent.used - 1, name)

    def oldest(self, name: str) -> NDArray[Any]:
        """The same in the oldest of the recent records."""
        return self._at(0, name)

    def _at(self, row: int, name: str) -> NDArray[Any]:
        table, names = (self._recent.counts, COUNTS) if name in COUNTS else (self._recent.values, VALUES)
        array: NDArray[Any] = table[row, names.index(name)]
        return array

    def mean(self, values: NDArray[Any]) -> NDArray[Any]:
        """Of each layer, the mean over its channels."""
        mean: NDArray[Any] = np.add.reduceat(values, self._starts) / self._sizes
        return mean

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of layers, given to each of their channels."""
        return np.repeat(values, self._sizes)

    def holding(self, channels: NDArray[np.bool_]) -> list[str]:
        """The layers that have one of these channels."""
        if not channels.any():
            return []
        hit = np.logical_or.reduceat(channels, self._starts)
        return [layer.name for layer, held in zip(self.layers, hit, strict=True) if held]

    def append(self, step: int, reading: Reading) -> None:
        """Record a reading, with what the batches since the one before were."""
        if self._recent.is_full:
            self._thin()
        batches = batches_between(self._last, reading)
        rms = rms_in_evaluation(reading, batches, self.eps)
        self._recent.append(step, (reading.values, batches, rms[None]), reading.counts)
        self._last = reading
        self.records += 1

    def _thin(self) -> None:
        """The older half of the recent records joins the earlier ones."""
        recent, earlier = self._recent, self._earlier
        first = self.records - recent.used
        for row in range(RECENT):
            if (first + row) % self.stride:
                continue
            if earlier.is_full:
                earlier.keep(slice(None, None, 2))
                self.stride *= 2
                if (first + row) % self.stride:
                    continue
            earlier.append(recent.steps[row], (recent.values[row],), recent.counts[row])
        recent.keep(slice(RECENT, None))

    def __getitem__(self, name: str) -> LayerHistory:
        watched, channels = self._slices[name]
        tables = [
            (
                table.steps[: table.used],
                table.values[: table.used, :, channels],
                table.counts[: table.used, :, channels],
            )
            for table in (self._earlier, self._recent)
            if table.used or table is self._recent
        ]
        momentum = None if self._last is None else float(self._last.momentum[channels.start])
        may_see_inputs = len(self.layers) > 1 and name == self.layers[0].name
        return LayerHistory(name, watched.eps, None if momentum != momentum else momentum, tables, may_see_inputs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def to_dict(self) -> dict[str, Any]:
        """Everything recorded, as NumPy arrays and plain numbers."""
        tables = {"earlier": self._earlier, "recent": self._recent}
        names = ("steps", "values", "counts")
        stored = {
            f"{which}_{name}": array[: table.used].copy()
            for which, table in tables.items()
            for name, array in zip(names, table.arrays, strict=True)
        }
        last = {} if self._last is None else {f"last_{name}": value for name, value in self._last._asdict().items()}
        return {"records": self.records, "stride": self.stride, **stored, **last}

    def restore(self, d: Mapping[str, Any]) -> None:
        """Go on from what `to_dict` gave, in a history of the same layers; it may have less memory."""
        for which, table in (("earlier", self._earlier), ("recent", self._recent)):
            rows = [np.asarray(d[f"{which}_{name}"]) for name in ("steps", "values", "counts")]
            thinner = 1
            while which == "earlier" and -(-len(rows[0]) // thinner) > len(table.steps):
                thinner *= 2
            for array, row in zip(table.arrays, rows, strict=True):
                kept = row[::thinner]
                array[: len(kept)] = kept
            table.used = len(kept)
            if which == "earlier":
                self.stride = int(d["stride"]) * thinner
        self.records = int(d["records"])
        if "last_values" in d:
            self._last = Reading(*(np.asarray(d[f"last_{name}"]) for name in Reading._fields))
