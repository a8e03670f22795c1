"""What is wrong with the batch norms of checkpoint files; nothing in a file is run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, TextIO

from cubn.health.diagnose import examine
from cubn.health.files import UnreadableFile, read
from cubn.health.report import Report
from cubn.health.wording import printable

CLEAN, FAULTY, UNREADABLE = 0, 1, 2
"""Exit statuses: no more than infos; a warning or an error; a file that cannot be read, or a page not written."""

ONE_FILE = ("html", "figure")
"""Options for what is made of one file's report."""


def diagnose(parser: argparse.ArgumentParser, files: list[str], **options: Any) -> int:
    """Examine every file, print what was found, and return the worst exit status."""
    for name in ONE_FILE:
        if options[name] and len(files) > 1:
            parser.error(f"--{name} is of one file; got {len(files)}")
    reports = {file: _report(file) for file in files}
    for file, report in reports.items():
        if reason := _reason(report):
            _print(f"cubn diagnose: {printable(file)}: {printable(reason)}", sys.stderr)
    if text := _as_json(reports) if options["json"] else "\n\n".join(_as_text(reports)):
        _print(text, sys.stdout)
    statuses = [_status(report) for report in reports.values()]
    for report in reports.values():
        if isinstance(report, Report):
            statuses.append(_written(report, options["html"], options["figure"]))
    return max(statuses)


def _print(text: str, stream: TextIO) -> None:
    """As far as the stream's encoding has the characters, and anybody reads it."""
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left in the buffer goes there at the end


def _report(file: str) -> Report | UnreadableFile:
    try:
        return examine(read(file))
    except UnreadableFile as error:
        return error


def _reason(report: Report | UnreadableFile) -> str:
    """Why a file, or statistics in it, could not be read; empty if they could."""
    if isinstance(report, UnreadableFile):
        return str(report)
    for layer in report.layers:
        for name in ("running_mean", "running_var"):
            if name in layer.dtypes and getattr(layer, name) is None:
                return f"{name} of {layer.name} is stored as {layer.dtypes[name]}, which is not read"
    return ""


def _status(report: Report | UnreadableFile) -> int:
    if isinstance(report, UnreadableFile) or _reason(report):
        return UNREADABLE
    return CLEAN if report.worst in (None, "info") else FAULTY


def _as_text(reports: dict[str, Report | UnreadableFile]) -> list[str]:
    """A table for each file that could be read, under the file's name."""
    return [
        f"{printable(file)}\n{report if report.layers else 'There are no batch norms with running statistics in it.'}"
        for file, report in reports.items()
        if isinstance(report, Report)
    ]


def _as_json(reports: dict[str, Report | UnreadableFile]) -> str:
    rows = [
        {"file": file, "report": json.loads(report.to_json())}
        if isinstance(report, Report)
        else {"file": file, "unreadable": str(report)}
        for file, report in reports.items()
    ]
    return json.dumps({"files": rows}, indent=2)


def _written(report: Report, html: str | None, figure: str | None) -> int:
    """The page and the figure, as far as they are asked for."""
    try:
        if html:
            report.to_html(html)
        if figure:
            _draw(report, figure)
    except (OSError, ImportError, ValueError) as error:  # ValueError: a figure's format that there is not
        _print(f"cubn diagnose: {printable(str(error))}", sys.stderr)
        return UNREADABLE
    return CLEAN


def _draw(report: Report, path: str) -> None:
    try:
        from cubn.health.figures import statistics
    except ImportError as error:
        raise ImportError(f"--figure needs matplotlib ({error}). Install it with: pip install matplotlib") from error
    statistics(report.layers).savefig(path)
