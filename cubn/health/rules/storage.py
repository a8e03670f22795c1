"""Rules on the types that statistics are stored in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn._state.arrays import STATISTICS
from cubn.health.layer import Float64, Layer
from cubn.health.rules.measures import RECALIBRATE
from cubn.health.rules.registry import Found, Network, rule, statistics, weight

DIGITS = {"bfloat16": 8, "float16": 11}
"""Binary digits of 16-bit numbers; the fewest first, for most numbers with fewer are also ones with more."""

LEAST_VALUES = 4
"""That tell whether numbers were rounded: a float32 number has a short form by chance once in 2**13."""

PLAIN = 8
"""Multiples of 1/8 are short whatever happened to them: 0, 1, counts of pixels."""

WIDEN = "bn.running_mean, bn.running_var = bn.running_mean.float(), bn.running_var.float()"


@rule("16-bit")
def sixteen_bits(layer: Layer, network: Network) -> Iterator[Found]:
    """Running statistics are stored in 16 bits, or were: every one of them is a 16-bit number.

    In 16 bits, updates of less than half a unit of the last place are lost: a statistic stands still where its goal is
    nearer than half a unit / momentum.
    """
    narrow = sorted({dtype for name in STATISTICS if (dtype := layer.dtypes.get(name, "")) in DIGITS})
    if narrow:
        evidence: dict[str, object] = {"stored in": ", ".join(narrow)}
        if momentum := weight(layer):
            digits = min(DIGITS[dtype] for dtype in narrow)
            evidence["stands still up to"] = f"{100 * 2.0**-digits / momentum:.2g} % from its goal"
        cause = "model.half() or model.to(torch.bfloat16), which convert buffers, too"
        yield Found("warning", "running statistics are stored in 16 bits", None, evidence, cause, WIDEN)
        return
    for mean, var in statistics(layer):
        values = np.concatenate([mean, var])
        values = values[np.isfinite(values)]
        telling = np.unique(values[values * PLAIN != np.round(values * PLAIN)])
        for name in DIGITS:
            if telling.size >= LEAST_VALUES and (_rounded(values, name) == values).all():
                yield Found(
                    "warning",
                    f"every running statistic is a {name} number, though they are stored in more bits",
                    None,
                    {"values that tell": int(telling.size), "stored in": layer.dtypes.get("running_var", "unknown")},
                    "a checkpoint or a model that was converted to 16 bits and back",
                    RECALIBRATE,
                )
                return


def _rounded(values: Float64, name: str) -> Float64:
    """The nearest numbers of a 16-bit type; of bfloat16, those cut off, which suits numbers that are."""
    with np.errstate(all="ignore"):
        if name == "float16":
            return values.astype(np.float16).astype(np.float64)
        bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
