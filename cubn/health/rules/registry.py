"""What a rule is given, what it gives, and the table of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn.health.finding import Finding, Severity
from cubn.health.layer import Float64, Layer

Channels = NDArray[np.bool_]
"""Of each channel, whether it is concerned."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a rule found of the layer that it was given.

    Attributes
    ----------
    severity : {"error", "warning", "info"}
    message : str
        One sentence.
    channels : bool array of shape (C,), or None
        Which of them; None for the layer as a whole.
    evidence : mapping of str to number, str or array
        What it is concluded from; arrays have a value for each of the channels found.
    cause, remedy : str
        What usually does this, and what mends it: a line of code where there is one.
    """

    severity: Severity
    message: str
    channels: Channels | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True, eq=False)
class Network:
    """All layers that are examined together, for rules that compare one with the others."""

    layers: Sequence[Layer]

    @cached_property
    def updated(self) -> frozenset[str]:
        """The names of layers whose running statistics are no longer 0 and 1."""
        return frozenset(layer.name for layer in self.layers if untouched(layer) is False)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many updates the layers that count them have seen."""
        counted = {layer.name: layer.tracked for layer in self.layers if layer.tracked is not None}
        return {name: int(tracked.max(initial=0)) for name, tracked in counted.items()}

    def may_see_inputs(self, layer: Layer) -> bool:
        """Whether it is the first of several, and may be given raw inputs, of which some are constant."""
        return len(self.layers) > 1 and layer.name == self.layers[0].name

    @cached_property
    def most_updates(self) -> int:
        """Of the layer that has seen most."""
        return max(self.counts.values(), default=0)


def untouched(layer: Layer) -> bool | None:
    """Whether every running mean is 0 and every running variance 1, as in a new layer; None without statistics."""
    if layer.running_mean is None or layer.running_var is None:
        return None
    return bool((layer.running_mean == 0).all() and (layer.running_var == 1).all())


def weight(layer: Layer) -> float | None:
    """What a batch weighs in the running statistics; None where it is not known or no constant."""
    return None if layer.momentum is None or layer.momentum == "cumulative" else float(layer.momentum)


Examine = Callable[[Layer, Network], Iterable[Found]]
Rule = Callable[[Layer, Network], list[Finding]]

RULES: dict[str, Rule] = {}
"""All rules, by their ids."""


def rule(name: str) -> Callable[[Examine], Examine]:
    """Make a function a rule: it looks at one layer, and yields what it found."""

    def register(examine: Examine) -> Examine:
        @functools.wraps(examine)
        def findings(layer: Layer, network: Network) -> list[Finding]:
            return [finding_of(name, layer.name, found) for found in examine(layer, network)]

        RULES[name] = findings
        return examine

    return register


def finding_of(name: str, layer: str, found: Found) -> Finding:
    """What was found, with plain numbers for arrays."""
    channels = () if found.channels is None else tuple(np.flatnonzero(found.channels).tolist())
    evidence = {
        key: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        for key, value in found.evidence.items()
    }
    return Finding(name, found.severity, layer, found.message, channels, evidence, found.cause, found.remedy)


def statistics(layer: Layer) -> Iterator[tuple[Float64, Float64]]:
    """Running mean and variance, once, where the layer has them."""
    if layer.running_mean is not None and layer.running_var is not None:
        yield layer.running_mean, layer.running_var
