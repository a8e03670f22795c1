"""What diagnosis says of a run with a planted fault, and whether that is right."""

from dataclasses import dataclass

import cubn
from cubn.health.finding import SEVERITIES, Finding
from cubn.sync import threads


@dataclass(frozen=True)
class Verdict:
    """What became of a planted fault.

    Attributes
    ----------
    rules : tuple of str
        Those that named it.
    missed : list of str
        Layers in which it was not found, or not in its channels, or not as bad as it is.
    blamed : list of Finding
        Errors elsewhere.
    """

    rules: tuple[str, ...]
    missed: list[str]
    blamed: list[Finding]


def judged(fault, run):
    """The Verdict on a run that has this fault."""
    report, named, channels = diagnosed(fault, run), fault.named(run), set(fault.channels)
    at_least = SEVERITIES[: SEVERITIES.index(fault.severity) + 1]
    right = [found for found in report.findings if found.rule in fault.rules and found.severity in at_least]
    found = {layer: [each for each in right if each.layer == layer] for layer in named}
    missed = [
        layer
        for layer, findings in found.items()
        if not findings or (channels and {channel for each in findings for channel in each.channels} != channels)
    ]
    blamed = [
        each
        for each in report.of("error")
        if each.layer not in named or (channels and not channels.issuperset(each.channels))
    ]
    return Verdict(tuple(sorted({each.rule for findings in found.values() for each in findings})), missed, blamed)


def diagnosed(fault, run):
    """The report of a run, of its first rank where there are several."""
    if fault.ranks is None:
        return cubn.diagnose(run.subject, run.moments if fault.data else None)
    subjects = fault.ranks(run)
    return threads.run(len(subjects), lambda comm: cubn.diagnose(subjects[comm.rank], comm=comm))[0]
