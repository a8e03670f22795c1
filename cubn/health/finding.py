"""What a rule finds, and how bad it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
"""error: outputs are wrong or will be; warning: worth a look before this is trusted; info: worth knowing."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The worst first."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one layer.

    Attributes
    ----------
    rule : str
        The rule's id, as `non-finite`.
    severity : {"error", "warning", "info"}
    layer : str
        The layer's name; a module's path in its model.
    message : str
        What was found, in one sentence.
    channels : tuple of int
        Which channels; empty where it is the layer as a whole.
    evidence : mapping of str to number, str or list of numbers
        What it is concluded from, by name.
    cause : str
        What usually does this.
    remedy : str
        What mends it: a line of code where there is one.
    """

    rule: str
    severity: Severity
    layer: str
    message: str
    channels: tuple[int, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    cause: str = ""
    remedy: str = ""
