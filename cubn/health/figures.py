"""Figures of running statistics, as matplotlib's `Figure` objects: no window, and none of pyplot's state.

They are 8 inches wide, legible at 800 pixels. Colours tell values apart in grey and to the colour-blind: cividis and
viridis go from dark to light. What is not finite is red, and has a mark of its own where it is a point.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cubn.health.finding import Finding
from cubn.health.gap import TrainEvalGap
from cubn.health.layer import Layer
from cubn.health.records import LayerHistory
from cubn.health.rules.measures import eps_of
from cubn.health.wording import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from cubn.health.report import Report

Floats = NDArray[Any]

WIDTH = 8.0
"""Inches."""

BLUE, ORANGE, GREY, RED = "#0b559f", "#e08214", "#777777", "#c00000"

LETTERS = 0x500
"""Latin, Greek and Cyrillic are before this; the rest of a name is written as escapes."""

SHOWN = 30
"""Layers that are drawn one by one; of more, those in the order given that fit."""

LEAST, MOST = 1e-46, 1e39
"""What axes can span, and float32 can hold: float64 numbers beyond are drawn at these."""

ERRORS = 2
"""Standard errors on each side of a sampling band."""

WINDOW = 10
"""Records whose batches say how far batches spread."""


def gain_histogram(layers: Sequence[Layer]) -> Figure:
    """Gains |gamma| / sqrt(running_var + eps): of all channels together, and by layer.

    Parameters
    ----------
    layers : sequence of Layer

    Returns
    -------
    matplotlib.figure.Figure
    """
    gains = [(layer.name, _gain(layer)) for layer in layers if layer.running_var is not None]
    figure = _figure(1.8 + _height(len(gains)))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.4, _height(len(gains))))
    known = [gain[np.isfinite(gain) & (gain > 0)] for _, gain in gains]
    together = np.concatenate([*known, np.empty(0)])
    most = 1
    if together.size:
        low, high = np.log10(together.min()) - 0.05, np.log10(together.max()) + 0.05
        counts, _, _ = above.hist(together, bins=np.logspace(low, high, 60).tolist(), color=BLUE)
        most = int(np.max(counts))
    above.set(xscale="log", yscale="symlog", ylabel="channels")
    above.set_yticks([0, *(10**power for power in range(len(str(most))))])
    above.yaxis.set_major_formatter("{x:g}")
    _strips(below, gains)
    below.set_xlabel("gain  |γ| / √(running_var + eps); the bar is the layer's median")
    return figure


def statistics(layers: Sequence[Layer]) -> Figure:
    """Running means, in standard deviations, and running variances: of each channel, by layer.

    Parameters
    ----------
    layers : sequence of Layer

    Returns
    -------
    matplotlib.figure.Figure
    """
    held = [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]
    figure = _figure(0.8 + _height(len(held)))
    left, right = figure.subplots(1, 2, sharey=True)
    with np.errstate(all="ignore"):
        means = [
            (layer.name, _drawable(layer.running_mean / np.sqrt(layer.running_var + eps_of(layer))))  # type: ignore[operator]
            for layer in held
        ]
    reach = max((float(np.abs(each[np.isfinite(each)]).max(initial=0)) for _, each in means), default=0.0)
    if reach > 1:
        left.set_xscale("symlog", linthresh=1)
    _strips(left, means)
    if reach > 1:
        left.set_xticks(_signed_powers(reach))
    left.set_xlabel("running_mean / √(running_var + eps)")
    right.set_xscale("log")
    _strips(right, [(layer.name, _drawable(layer.running_var)) for layer in held])  # type: ignore[arg-type]
    for eps in sorted({eps_of(layer) for layer in held if LEAST < eps_of(layer) < MOST}):
        right.axvline(eps, color=GREY, linestyle="--", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "annotation_clip": True}
        right.annotate("eps", (eps, 1.0), (0, 3), color=GREY, ha="center", **place)
    right.set_xlabel("running_var")
    return figure


def channels_by_steps(history: LayerHistory) -> Figure:
    """Running mean and variance of a layer over a training: channels against steps.

    Parameters
    ----------
    history : LayerHistory
        As `monitor.history["layer1.0.bn1"]`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.colors import LogNorm, SymLogNorm

    mean, var = _drawable(history.running_mean), _drawable(history.running_var)
    figure = _figure(5.2)
    above, below = figure.subplots(2, 1, sharex=True)
    reach = np.max(np.abs(mean), initial=1e-6, where=np.isfinite(mean))
    positive = np.isfinite(var) & (var > 0)
    low, high = np.min(var, initial=1.0, where=positive), np.max(var, initial=1e-12, where=positive)
    bar = _image(above, history.steps, mean, SymLogNorm(reach / 30, vmin=-reach, vmax=reach), "cividis", "running_mean")
    bar.set_ticks(
        np.array([-1, -0.1, 0, 0.1, 1]) * reach, labels=[f"{part * reach:.2g}" for part in (-1, -0.1, 0, 0.1, 1)]
    )
    _image(below, history.steps, var, LogNorm(low, max(high, 1.01 * low)), "viridis", "running_var")
    _title(figure, history.name)
    below.set_xlabel("step")
    return figure


def running_against_batch(layer: Layer | LayerHistory) -> Figure:
    """Running statistics of a layer against those of its batches, with the band in which chance leaves them.

    Parameters
    ----------
    layer : Layer or LayerHistory
        A layer with Moments of its inputs; or a monitor's history: the newest batch that it knows.

    Returns
    -------
    matplotlib.figure.Figure

    Notes
    -----
    The band is two standard errors of the difference on each side. With Moments of n values and a momentum w that is
    sqrt((1 + w / (2 - w)) / n) standard deviations for means; sqrt(2) times that, relative, for variances of normal
    values. Of a history, the spread of its last 10 batches stands for what n would tell.
    """
    mean, var, running_mean, running_var, error_of_mean, error_of_var = _compared(layer)
    figure = _figure(4.0)
    left, right = figure.subplots(1, 2)
    with np.errstate(all="ignore"):
        deviation = np.sqrt(np.where(var > 0, var, np.nan))
        _against(left, mean / deviation, running_mean / deviation, error_of_mean, relative=False)
        var, running_var = (np.where(values > 0, values, np.nan) for values in (var, running_var))
        _against(right, var, running_var, error_of_var, relative=True)
    left.set(xlabel="batch mean, in its standard deviations", ylabel="running_mean, in the same")
    right.set(xlabel="batch variance", ylabel="running_var")
    _title(figure, layer.name)
    return figure


def gap_by_layer(gap: TrainEvalGap) -> Figure:
    """The train/eval gap of each layer, the worst above.

    Parameters
    ----------
    gap : TrainEvalGap
        As from `train_eval_gap`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    layers = gap.layers[:SHOWN]
    panels = {"local: change of its own output": ([layer.local for layer in layers], BLUE)}
    if gap.measure is not None:
        what = "loss" if gap.measure == "loss" else "output"
        panels[f"alone: change of the {what}"] = [layer.alone or 0.0 for layer in layers], ORANGE
        panels[f"all but it: change of the {what}"] = [layer.remaining or 0.0 for layer in layers], GREY
    figure = _figure(0.8 + _height(len(layers)))
    rows = np.arange(len(layers))
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, (values, colour)) in zip(drawn, panels.items(), strict=True):
        _bars(axes, rows, [max(value, 0.0) for value in values], colour)
        axes.set_xlabel(label)
    _name_rows(drawn[0], [layer.name for layer in layers])
    return figure


def of_report(report: Report) -> list[tuple[str, Figure]]:
    """The figures of a report, each with its title; none where nothing has statistics.

    Parameters
    ----------
    report : Report

    Returns
    -------
    list of (str, matplotlib.figure.Figure)
    """
    layers = [layer for layer in report.layers if layer.running_var is not None and layer.num_features]
    if not layers:
        return []
    shown = _those_found_first(layers, report.findings)
    return [
        ("Gains", gain_histogram(shown)),
        ("Running statistics", statistics(shown)),
        *(
            (f"Running statistics of {layer.name} against its batches", running_against_batch(layer))
            for layer in [layer for layer in shown if layer.moments is not None][:3]
        ),
    ]


def svg(figure: Figure) -> str:
    """A figure as SVG, the same text for the same figure.

    Parameters
    ----------
    figure : matplotlib.figure.Figure

    Returns
    -------
    str
        Beginning with `<svg`, to stand in a page.
    """
    import matplotlib

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # which would move things a little each time
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cubn"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((WIDTH, height), dpi=100, layout="constrained")


def _height(rows: int) -> float:
    return 0.5 + 0.22 * min(max(rows, 1), SHOWN)


def _short(name: str, length: int = 24) -> str:
    """The end of a name, in characters that matplotlib's own font has."""
    drawn = "".join(each if ord(each) < LETTERS else ascii(each)[1:-1] for each in printable(name))
    return drawn if len(drawn) <= length else f"…{drawn[1 - length :]}"


def _title(figure: Figure, name: str) -> None:
    figure.suptitle(_short(name, 80), parse_math=False)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """The first above."""
    axes.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _gain(layer: Layer) -> Floats:
    assert layer.running_var is not None
    gamma = np.ones(layer.num_features) if layer.gamma is None else layer.gamma
    with np.errstate(all="ignore"):
        return _drawable(np.abs(gamma) / np.sqrt(layer.running_var + eps_of(layer)))


def _drawable(values: Floats) -> Floats:
    """Numbers within what axes can span; zeros, infinities and NaN as they are."""
    values = np.asarray(values, np.float64)
    size = np.clip(np.abs(values), LEAST, MOST)
    drawable: Floats = np.where(np.isfinite(values) & (values != 0), np.copysign(size, values), values)
    return drawable


def _those_found_first(layers: Sequence[Layer], findings: Sequence[Finding]) -> list[Layer]:
    """As many as are shown, in their order: those with the worst findings, and others."""
    found = [finding.layer for finding in findings]  # the worst first
    rank = {name: found.index(name) for name in dict.fromkeys(found)}
    by_finding = sorted(range(len(layers)), key=lambda i: rank.get(layers[i].name, len(found)))
    return [layers[i] for i in sorted(by_finding[:SHOWN])]


def _signed_powers(reach: float) -> list[float]:
    """Powers of ten up to a number, with both signs and 0, not too many to be read."""
    most = int(np.log10(reach))
    step = most // 2 + 1
    powers = [10.0**power for power in range(most % step, most + 1, step)]
    return [*(-power for power in reversed(powers)), 0.0, *powers]


def _strips(axes: Axes, values: Sequence[tuple[str, Floats]]) -> None:
    """A row of points for each layer, the first above, with its median; at the edges what cannot be drawn."""
    is_log = axes.get_xscale() == "log"
    low, high = np.inf, -np.inf
    for row, (_, each) in enumerate(values):
        finite = np.isfinite(each)
        drawn = each[finite & (each > 0)] if is_log else each[finite]
        low, high = min(low, drawn.min(initial=np.inf)), max(high, drawn.max(initial=-np.inf))
        axes.plot(drawn, np.full(len(drawn), row), "o", color=BLUE, markersize=3, alpha=0.5, markeredgewidth=0)
        if len(drawn):
            axes.plot([np.median(drawn)], [row], "|", color="black", markersize=9, markeredgewidth=1.5)
        for wrong, place, marker in ((~finite, 1.0, "x"), (finite & (each <= 0), 0.0, "<")):
            if wrong.any() and (marker == "x" or len(drawn) < finite.sum()):
                axes.plot([place], [row], marker, color=RED, transform=axes.get_yaxis_transform(), clip_on=False)
    if not low < high:  # a single value, or none
        middle = low if np.isfinite(low) else 1.0
        reach = max(1.0, abs(middle))
        axes.set_xlim(*((middle / 10, middle * 10) if is_log else (middle - reach, middle + reach)))
    _name_rows(axes, [name for name, _ in values])
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)


def _image(axes: Axes, steps: Floats, values: Floats, norm: Normalize, colours: str, label: str) -> Colorbar:
    """Channels against steps; what a logarithm does not have is red."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    cmap = matplotlib.colormaps[colours].with_extremes(bad=RED)
    edges = np.append(steps, steps[-1] + max(1, np.diff(steps[-2:]).sum()))
    wrong = ~np.isfinite(values) | ((values <= 0) & (type(norm).__name__ == "LogNorm"))
    drawn = np.ma.masked_array(values, wrong).T
    rows = np.arange(values.shape[1] + 1) - 0.5
    image = axes.pcolormesh(edges, rows, drawn, norm=norm, cmap=cmap, rasterized=True)
    axes.set_ylabel("channel")
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return axes.figure.colorbar(image, ax=axes, label=label)


def _compared(layer: Layer | LayerHistory) -> tuple[Any, ...]:
    """Batch mean and variance, running mean and variance, and standard errors of their differences."""
    if isinstance(layer, LayerHistory):
        recent = layer.last(WINDOW)
        known = np.isfinite(recent.batch_var).all(axis=1)
        newest = int(np.flatnonzero(known)[-1]) if known.any() else -1
        means, variances = recent.batch_mean[known], recent.batch_var[known]
        with np.errstate(all="ignore"):
            size = np.sqrt(1 + _noise(layer.momentum)) / variances.mean(axis=0)
            errors = (
                np.nanmedian(means.std(axis=0) * np.sqrt(variances.mean(axis=0)) * size),
                np.nanmedian(variances.std(axis=0) * size),
            )
        running = recent.running_mean[newest], recent.running_var[newest]
        return recent.batch_mean[newest], recent.batch_var[newest], *running, *errors
    moments = layer.moments
    if moments is None:
        raise ValueError("running_against_batch: layer must have Moments; got none. Pass them to cubn.diagnose.")
    momentum = layer.momentum if isinstance(layer.momentum, float) else None
    error = float(np.sqrt((1 + _noise(momentum)) / moments.count))
    return moments.mean, moments.var(), layer.running_mean, layer.running_var, error, np.sqrt(2) * error


def _noise(momentum: float | None) -> float:
    """The variance of a running statistic, where that of a batch's is 1."""
    return 0.0 if momentum is None else momentum / (2 - momentum)


def _against(axes: Axes, batch: Floats, running: Floats, error: float, *, relative: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    batch, running = _drawable(batch), _drawable(running)
    known = np.isfinite(batch) & np.isfinite(running)
    both = np.concatenate((batch[known], running[known]))
    low, high = (float(both.min()), float(both.max())) if both.size else (0.1, 1.0)
    if relative:
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(numticks=5) if high > 30 * low else LogLocator(subs=(1.0, 3.0)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        line = np.geomspace(low / 1.3, high * 1.3, 50)
        band = line / (1 + ERRORS * error), line * (1 + ERRORS * error)
    else:
        pad = 0.08 * (high - low) + 1e-3
        line = np.linspace(low - pad, high + pad, 50)
        band = line - ERRORS * error, line + ERRORS * error
    axes.fill_between(line, *band, color="#cccccc", linewidth=0, label="chance")
    axes.plot(line, line, color=GREY, linewidth=1)
    inside = known & _within(batch, running, error, relative)
    for where, colour, marker in ((inside, BLUE, "o"), (known & ~inside, ORANGE, "^")):
        label = f"{int(where.sum())} channels {'within' if where is inside else 'beyond'}"
        axes.plot(batch[where], running[where], marker, color=colour, markersize=4, markeredgewidth=0, label=label)
    axes.legend(loc="lower right", frameon=False, fontsize="small")


def _within(batch: Floats, running: Floats, error: float, relative: bool) -> Floats:
    with np.errstate(all="ignore"):
        off = np.abs(np.log(running / batch)) if relative else np.abs(running - batch)
    within: Floats = off <= (np.log1p(ERRORS * error) if relative else ERRORS * error)
    return within


def _bars(axes: Axes, rows: Floats, values: Sequence[float], colour: str) -> None:
    """Those that are infinite reach the edge, in red."""
    finite = [value for value in values if np.isfinite(value)]
    edge = 1.05 * max(finite, default=1.0) or 1.0
    drawn = [value if np.isfinite(value) else edge for value in values]
    axes.barh(rows, drawn, color=[colour if np.isfinite(value) else RED for value in values])
    axes.set_xlim(0, edge)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
