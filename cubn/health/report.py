"""What was found, as a value: looked through, printed, stored, shown."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from cubn._arguments import one_of
from cubn.errors import reporting_as
from cubn.health.as_html import as_page, as_part
from cubn.health.as_json import as_json
from cubn.health.as_text import as_text
from cubn.health.finding import SEVERITIES, Finding, Severity
from cubn.health.layer import Layer


class Report:
    """What `cubn.diagnose` found, the worst first.

    `print(report)` shows a table, in colour where the output is a terminal and rich is installed; notebooks show HTML.

    Attributes
    ----------
    findings : tuple of Finding
        The worst first; among equals, in the order of the layers.
    layers : tuple of Layer
        All that was examined.
    """

    def __init__(self, layers: Sequence[Layer], findings: Sequence[Finding]) -> None:
        self.layers = tuple(layers)
        self.findings = tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))

    @property
    def worst(self) -> Severity | None:
        """The severity of the worst finding; None where nothing was found."""
        return self.findings[0].severity if self.findings else None

    @reporting_as("of")
    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        one_of(SEVERITIES, severity, "severity")
        return [finding for finding in self.findings if finding.severity == severity]

    def to_json(self) -> str:
        """Findings and layers in JSON; docs/health.md has the schema. Numbers that are not finite are words."""
        return as_json(self.layers, self.findings)

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """One page, with figures where matplotlib is installed; nothing in it comes from elsewhere.

        Parameters
        ----------
        path : str or path, optional
            The file it is written to.

        Returns
        -------
        str
            The page.
        """
        page = as_page(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def __str__(self) -> str:
        return as_text(self.layers, self.findings)

    def _repr_html_(self) -> str:
        return as_part(self.layers, self.findings)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}={len(self.of(name))}" for name in SEVERITIES)
        return f"Report(layers={len(self.layers)}, {counts})"
