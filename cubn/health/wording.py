"""Findings in words, the same in every format: channels, numbers, evidence, names without control characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from cubn.health.finding import SEVERITIES, Finding
from cubn.health.layer import Layer

_RUNS = 6
"""Runs of channels that are named."""

_NUMBERS = 4
"""Numbers of a list that are shown."""


def printable(text: str) -> str:
    """Text without what a terminal obeys or an eye does not see: control characters are written as escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def headline(layers: Sequence[Layer], findings: Sequence[Finding]) -> str:
    """`1 error, 2 warnings in 21 batch norms`."""
    counts = {name: sum(finding.severity == name for finding in findings) for name in SEVERITIES}
    said = [_counted(count, name) for name, count in counts.items() if count]
    return (
        f"{', '.join(said) or 'nothing found'} in {_counted(len(layers), 'batch norm') if layers else 'no batch norms'}"
    )


def channels(finding: Finding, features: int) -> str:
    """`0-3, 7`; `all 64`; nothing where it is the layer as a whole. Long lists are shortened."""
    found = finding.channels
    if found and len(found) == features > 1:
        return f"all {features}"
    runs = [[channel for _, channel in run] for _, run in groupby(enumerate(found), lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:_RUNS])
    return text if len(runs) <= _RUNS else f"{text}, … ({len(found)} in all)"


def evidence(finding: Finding) -> str:
    """`running_var 5.6e-45, eps 1e-05`."""
    return printable(", ".join(f"{name} {_value(value)}" for name, value in finding.evidence.items()))


def remedies(findings: Iterable[Finding]) -> dict[str, tuple[list[str], list[str]]]:
    """Causes and remedies of each rule that found something, every one once."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for finding in findings:
        causes, lines = found.setdefault(finding.rule, ([], []))
        for text, texts in ((finding.cause, causes), (finding.remedy, lines)):
            if text and text not in texts:
                texts.append(text)
    return found


def sizes(layers: Iterable[Layer]) -> dict[str, int]:
    """Channels of each layer."""
    return {layer.name: layer.num_features for layer in layers}


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(_value, value[:_NUMBERS]))
        return f"[{shown}, …]" if len(value) > _NUMBERS else shown if len(value) == 1 else f"[{shown}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
