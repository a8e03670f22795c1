"""What is wrong with batch norms: every rule asked about every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cubn._floating_point import default_floating_point
from cubn._moments import Moments
from cubn.errors import a_type, message, quoted, reporting_as
from cubn.health.layer import Layer, layers_of
from cubn.health.report import Report
from cubn.health.rules import RULES, Network
from cubn.typing import Comm


@reporting_as("diagnose")
def diagnose(
    subject: Any, moments: Moments | Mapping[str, Moments] | None = None, *, comm: Comm | None = None
) -> Report:
    layers = _with_moments(layers_of(subject), moments)
    return examine(layers)


@default_floating_point
def examine(layers: Sequence[Layer]) -> Report:
    """Ask every rule about every layer.

    Parameters
    ----------
    layers : sequence of Layer

    Returns
    -------
    Report
    """
    network = Network(layers)
    with np.errstate(all="ignore"):
        found = [
            finding
            for layer in layers
            if layer.num_features
            for examine_layer in RULES.values()
            for finding in examine_layer(layer, network)
        ]
    return Report(layers, found)


def _with_moments(layers: list[Layer], moments: Any) -> list[Layer]:
    """Layers with the Moments of their inputs: of the only layer, or by name."""
    if moments is None:
        return layers
    return layers
