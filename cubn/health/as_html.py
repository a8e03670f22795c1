"""A report as HTML: a page of its own, or a part of a notebook. Nothing in it comes from elsewhere."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

from cubn.health import wording
from cubn.health.finding import Finding
from cubn.health.layer import Layer

_STYLE = """
.cubn-report { font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: auto; }
.cubn-report table { border-collapse: collapse; width: 100%; }
.cubn-report th, .cubn-report td {
  text-align: left; vertical-align: top; padding: .35em .8em .35em 0; border-bottom: 1px solid #8886;
}
.cubn-report code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.cubn-report small { opacity: .75; overflow-wrap: anywhere; }
.cubn-report b { padding: .1em .5em; border-radius: .4em; color: #fff; font-weight: 600; }
.cubn-report .error { background: #b3261e; }
.cubn-report .warning { background: #8a5a00; }
.cubn-report .info { background: #2b5f8a; }
.cubn-report td:nth-child(2) code { display: block; min-width: 15em; }
.cubn-report figure {
  width: fit-content; max-width: 100%; box-sizing: border-box; overflow-x: auto;
  margin: 1.5em 0; padding: .5em; background: #fff; color: #000; border-radius: .4em;
}
.cubn-report figure svg { max-width: 100%; min-width: 36rem; height: auto; display: block; }
@media (max-width: 45em) {
  .cubn-report thead { display: none; }
  .cubn-report tr { display: block; padding: .6em 0; border-bottom: 1px solid #8886; }
  .cubn-report td { display: block; border: 0; padding: .1em 0; }
  .cubn-report td:nth-child(n + 3):not(:empty)::before { content: attr(data-name) ": "; opacity: .75; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>cubn: {title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 1.2em; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def as_page(report: Any) -> str:
    """A page of its own, with figures where matplotlib is installed."""
    title = escape(wording.headline(report.layers, report.findings))
    figures = "\n".join(_figures(report))
    return _PAGE.format(title=title, body=as_part(report.layers, report.findings, figures))


def as_part(layers: Sequence[Layer], findings: Sequence[Finding], figures: str = "") -> str:
    """What goes into a page: its colours are the page's own."""
    parts = [
        f"<style>{_STYLE}</style>",
        '<div class="cubn-report">',
        f"<h1>{escape(wording.headline(layers, findings))}</h1>",
        _findings(layers, findings) if findings else "",
        figures,
        "<h2>Layers</h2>" if layers else "",
        _layers(layers) if layers else "",
        "</div>",
    ]
    return "\n".join(part for part in parts if part)


def _findings(layers: Sequence[Layer], findings: Sequence[Finding]) -> str:
    features = wording.sizes(layers)
    rows = [
        (
            f'<b class="{finding.severity}">{finding.severity}</b>',
            _code(finding.layer),
            escape(wording.channels(finding, features.get(finding.layer, 0))),
            f"{escape(finding.rule)}: {escape(finding.message)}<br><small>{escape(wording.evidence(finding))}</small>",
            f"<small>usually {escape(finding.cause)}</small><br>{_code(finding.remedy)}",
        )
        for finding in findings
    ]
    return _table(("severity", "layer", "channels", "what", "why, and what to do"), rows)


def _layers(layers: Sequence[Layer]) -> str:
    rows = [
        (
            _code(layer.name),
            str(layer.num_features),
            _shown(layer.eps),
            _shown(layer.momentum),
            "" if layer.tracked is None or not layer.tracked.size else str(int(layer.tracked.max())),
            escape(", ".join(sorted(set(layer.dtypes.values())))),
        )
        for layer in layers
    ]
    return _table(("layer", "channels", "eps", "momentum", "updates", "stored in"), rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "\n".join(f"<tr>{_cells(headings, row)}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _cells(headings: Sequence[str], row: Sequence[str]) -> str:
    """Each with its heading, which narrow screens show beside it."""
    return "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in zip(headings, row, strict=True))


def _code(text: str) -> str:
    return f"<code>{escape(wording.printable(text))}</code>" if text else ""


def _shown(option: float | str | None) -> str:
    return "" if option is None else escape(f"{option:g}" if isinstance(option, float) else str(option))


def _figures(report: Any) -> Iterator[str]:
    """Each as an SVG without its prologue and metadata, which name other places."""
    if find_spec("matplotlib") is None:
        return
    figures = importlib.import_module("cubn.health.figures")
    for title, figure in figures.of_report(report):
        drawn = figures.svg(figure)
        drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
        yield f"<figure>\n<figcaption>{escape(wording.printable(title))}</figcaption>\n{drawn}\n</figure>"
