"""How far outputs move between a batch's statistics and the running ones: by layer, and what comes of it."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn.health.as_json import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Float64 = NDArray[np.float64]

SHOWN = 4
"""Channels of a layer in the table."""


class Squares(NamedTuple):
    """Of a layer's output by a batch's statistics, and of what running statistics change in it: means over values."""

    output: Float64
    """Of shape (C,)."""
    change: Float64
    """Of shape (C,)."""


def squares(
    batch: tuple[Float64, Float64],
    running: tuple[Float64, Float64],
    gamma: Float64 | float,
    beta: Float64 | float,
    eps: float,
) -> Squares:
    """Mean squares of a layer's output, and of its change, from mean and variance (m2 / count) of the input alone.

    With u = (x - mean) / sqrt(var + eps) of the batch, whose mean square is var / (var + eps),

        y_running - y_batch = gamma * (u * (sqrt((var + eps) / (running_var + eps)) - 1)
                                       + (mean - running_mean) / sqrt(running_var + eps))
    """
    (mean, var), (running_mean, running_var) = batch, running
    with np.errstate(all="ignore"):
        deviation = np.sqrt(running_var + eps)
        stretch = np.sqrt(var + eps) / deviation - 1
        shift = (mean - running_mean) / deviation
        spread = var / (var + eps)
        output = gamma**2 * spread + beta**2
        change = gamma**2 * (spread * stretch**2 + shift**2)
    return Squares(np.broadcast_to(output, var.shape), np.where(np.isnan(change), np.inf, change))


@dataclass(frozen=True, eq=False)
class LayerGap:
    """What running statistics change in one layer.

    Attributes
    ----------
    name : str
    num_features : int
        Channels, C.
    local : float
        For the same input, the root mean square of y_running - y_batch over that of y_batch; 0 where running statistics
        are those of the batches, inf where they are not finite.
    channels : float64 array of shape (C,)
        The same of each channel, over the root mean square of the layer: local**2 is their mean square.
    alone : float or None
        How far the model's output (or loss) moves when this layer alone uses its running statistics.
    remaining : float or None
        How far it is off when all layers but this one do.
    """

    name: str
    num_features: int
    local: float
    channels: Float64
    alone: float | None = None
    remaining: float | None = None

    @classmethod
    def of(cls, name: str, batches: Sequence[tuple[float, Squares]], **contribution: float) -> LayerGap:
        """Of batches, each with its number of values."""
        total = sum(count for count, _ in batches)
        output, change = (
            sum((count / total * each[i] for count, each in batches), np.zeros(len(batches[0][1].change)))
            for i in range(2)
        )
        size = math.sqrt(float(np.mean(output)))
        with np.errstate(all="ignore"):
            channels = np.where(change > 0, np.sqrt(change) / size, 0.0)
        return cls(name, len(channels), float(np.sqrt(np.mean(channels**2))), channels, **contribution)

    @property
    def worst(self) -> tuple[int, ...]:
        """Channels, those that move most first; those that do not move are left out."""
        order = np.argsort(-self.channels, kind="stable")
        return tuple(order[self.channels[order] > 0].tolist())


@dataclass(frozen=True, eq=False)
class TrainEvalGap:
    """What `train_eval_gap` found. `print` shows a table.

    Attributes
    ----------
    layers : tuple of LayerGap
        Ranked: those that move the model's output most by themselves first; of plain states, those with the largest
        local gap.
    measure : {"output", "loss"} or None
        What `alone`, `remaining` and `total` are of: the root mean square by which the model's output moves, over that
        of the output by batch statistics; or the difference of losses. None for plain states.
    total : float or None
        How far it moves when all layers use their running statistics, as in evaluation.
    losses : tuple of two floats, or None
        By batch statistics, and by running statistics.
    """

    layers: tuple[LayerGap, ...]
    measure: Literal["output", "loss"] | None = None
    total: float | None = None
    losses: tuple[float, float] | None = None

    def to_json(self) -> str:
        """Everything, in JSON; numbers that are not finite are words."""
        layers = [{**asdict(layer), "channels": layer.channels.tolist()} for layer in self.layers]
        found = {"measure": self.measure, "total": self.total, "losses": self.losses, "layers": layers}
        return json.dumps(plain(found), indent=2, allow_nan=False)

    def figure(self) -> Figure:
        """The gap by layer, as `cubn.health.figures.gap_by_layer` draws it."""
        figure: Figure = importlib.import_module("cubn.health.figures").gap_by_layer(self)  # which imports this
        return figure

    def __str__(self) -> str:
        header = ["layer", "local", *(() if self.measure is None else ("alone", "remaining")), "channels"]
        rows = [header, *map(self._row, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return f"{self._head()}\n\n{table}"

    def _row(self, layer: LayerGap) -> list[str]:
        worst = [f"{channel} ({layer.channels[channel]:.2g})" for channel in layer.worst[:SHOWN]]
        more = len(layer.worst) - SHOWN
        numbers = (layer.local,) if self.measure is None else (layer.local, layer.alone, layer.remaining)
        shown = [f"{number:.3g}" for number in numbers if number is not None]
        return [layer.name, *shown, " ".join(worst) + (f" and {more} more" if more > 0 else "")]

    def _head(self) -> str:
        if self.measure is None:
            return "Outputs by running statistics differ from those by the batches' own, relative to these:"
        if self.losses is not None:
            before, after = self.losses
            return f"The loss is {before:.4g} by the batches' statistics and {after:.4g} by the running ones."
        return f"The model's output moves by {self.total:.3g} of its size from the batches' statistics to the running."


def ranked(layers: Sequence[LayerGap]) -> tuple[LayerGap, ...]:
    """The worst first."""
    return tuple(sorted(layers, key=lambda layer: -(layer.local if layer.alone is None else layer.alone)))
