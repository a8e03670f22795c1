"""A report in JSON, as docs/health.md describes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cubn.health.finding import SEVERITIES, Finding
from cubn.health.layer import Counts, Layer

SCHEMA = 1
"""Of what is written; another number where an entry changes its meaning or goes."""


def as_json(layers: Sequence[Layer], findings: Sequence[Finding]) -> str:
    """Layers and findings; numbers that JSON does not have are the words "nan", "inf" and "-inf"."""
    written = {
        "schema": SCHEMA,
        "worst": findings[0].severity if findings else None,
        "counts": {name: sum(finding.severity == name for finding in findings) for name in SEVERITIES},
        "layers": [_layer(layer) for layer in layers],
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(plain(written), indent=2, allow_nan=False)


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "num_features": layer.num_features,
        "eps": layer.eps,
        "momentum": layer.momentum,
        "running_variance": layer.running_variance,
        "dtypes": dict(layer.dtypes),
        "tracked": _span(layer.tracked),
        "skipped": _span(layer.skipped),
    }


def _span(counts: Counts | None) -> list[int] | None:
    """The least and the most of the channels' counts."""
    return None if counts is None or not counts.size else [int(counts.min()), int(counts.max())]


def plain(value: Any) -> Any:
    """What JSON has, for what it does not have."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
