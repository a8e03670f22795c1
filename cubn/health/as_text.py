"""A report as a table: plain, or in colour where a terminal shows it and rich is installed."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from cubn.health import wording
from cubn.health.finding import Finding
from cubn.health.layer import Layer

_HEADINGS = ("severity", "layer", "channels", "rule", "what")
_COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}

_NARROW = 80
"""Columns of a terminal: in fewer, a table's own would be a few letters wide."""


def as_text(layers: Sequence[Layer], findings: Sequence[Finding]) -> str:
    """The table, as it suits standard output."""
    if sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and find_spec("rich"):
        return in_colour(layers, findings)
    return plain(layers, findings)


def plain(layers: Sequence[Layer], findings: Sequence[Finding]) -> str:
    """A line for each finding, and what to do about each rule's."""
    lines = [wording.headline(layers, findings)]
    if findings:
        rows = [_HEADINGS, *_rows(layers, findings)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS) - 1)]
        lines.append("")
        for *cells, last in rows:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append("  ".join([*padded, last]))
    for name, (causes, remedies) in wording.remedies(findings).items():
        lines += ["", f"{name}:"]
        lines += [f"  usually {cause}" for cause in causes]
        lines += [f"  remedy: {remedy}" for remedy in remedies]
    return "\n".join(lines)


def in_colour(layers: Sequence[Layer], findings: Sequence[Finding]) -> str:
    """The same by rich, as wide as the terminal. Names go in as text, so that no markup in them is obeyed."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    stream, width = io.StringIO(), shutil.get_terminal_size().columns
    console = Console(file=stream, force_terminal=True, width=width, highlight=False, legacy_windows=False)

    def indented(text: str, style: str = "") -> None:
        console.print(Padding(Text(text, style, overflow="fold"), (0, 0, 0, 2)))

    rows = _rows(layers, findings)
    console.print(Text(wording.headline(layers, findings), "bold"))
    if rows and width < _NARROW:
        for severity, layer, channels, rule, what in rows:
            console.print(Text(f"{severity} ", _COLOURS[severity]) + Text(f"{layer}  {channels}", overflow="fold"))
            indented(f"{rule}: {what}")
    elif rows:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in _HEADINGS:
            table.add_column(heading, overflow="fold", no_wrap=heading in ("severity", "rule"))
        for severity, *cells in rows:
            table.add_row(Text(severity, _COLOURS[severity]), *map(Text, cells))
        console.print(table)
    for name, (causes, remedies) in wording.remedies(findings).items():
        console.print(Text(f"\n{name}:", "bold"))
        for cause in causes:
            indented(f"usually {cause}", "dim")
        for remedy in remedies:
            indented(remedy, "green")
    return stream.getvalue().rstrip("\n")


def _rows(layers: Sequence[Layer], findings: Sequence[Finding]) -> list[tuple[str, str, str, str, str]]:
    features = wording.sizes(layers)
    return [
        (
            finding.severity,
            wording.printable(finding.layer),
            wording.channels(finding, features.get(finding.layer, 0)),
            finding.rule,
            f"{finding.message} ({wording.evidence(finding)})" if finding.evidence else finding.message,
        )
        for finding in findings
    ]
