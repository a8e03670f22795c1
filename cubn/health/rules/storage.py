"""Rules on the types that statistics are stored in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubn._state.arrays import STATISTICS
from cubn.health.layer import Float64, Layer
from cubn.health.rules.registry import Found, Network, rule, statistics

DIGITS = {"float16": 11, "bfloat16": 8}
"""Binary digits of 16-bit numbers."""

LEAST_VALUES = 4
"""That tell whether numbers were rounded: a float32 number has a short form by chance once in 2**13."""

PLAIN = 8
"""Multiples of 1/8 are short whatever happened to them: 0, 1, counts of pixels."""

WIDEN = "bn.running_mean, bn.running_var = bn.running_mean.float(), bn.running_var.float()"


@rule("16-bit-statistics")
def sixteen_bit_statistics(layer: Layer, network: Network) -> Iterator[Found]:
    """Running statistics are stored in 16 bits: updates that are less than half a unit of the last place are lost.

    A statistic then stands still at a distance of half a unit / momentum from where it should go.
    """
    narrow = {name: dtype for name in STATISTICS if (dtype := layer.dtypes.get(name)) in DIGITS}
    if not narrow:
        return
    digits = min(DIGITS[dtype] for dtype in narrow.values())
    evidence: dict[str, object] = dict(narrow)
    if isinstance(layer.momentum, float) and layer.momentum > 0:
        evidence["stands still at a distance of"] = f"{100 * 2.0**-digits / layer.momentum:.2g} %"
    yield Found(
        "warning",
        f"running statistics are stored in {' and '.join(sorted(set(narrow.values())))}",
        evidence=evidence,
        cause="model.half() or model.to(torch.bfloat16), which convert buffers, too",
        remedy=WIDEN,
    )


@rule("rounded-statistics")
def rounded_statistics(layer: Layer, network: Network) -> Iterator[Found]:
    """All running statistics are 16-bit numbers, though they are stored in more: they went through 16 bits once."""
    if any(layer.dtypes.get(name) in DIGITS for name in STATISTICS):
        return
    for mean, var in statistics(layer):
        values = np.concatenate([mean, var])
        telling = np.unique(values[np.isfinite(values) & (values * PLAIN != np.round(values * PLAIN))])
        if telling.size < LEAST_VALUES:
            return
        for name in DIGITS:
            if (_rounded(values, name) == values)[np.isfinite(values)].all():
                yield Found(
                    "warning",
                    f"every running statistic is a {name} number, stored in {layer.dtypes.get('running_var', 'more')}",
                    evidence={"values that tell": int(telling.size)},
                    cause="a checkpoint or a model that was converted to 16 bits and back",
                    remedy="cubn.recalibrate(model, batches)",
                )
                return


def _rounded(values: Float64, name: str) -> Float64:
    """The nearest numbers of a 16-bit type; of bfloat16, those cut off, which suits numbers that are."""
    with np.errstate(all="ignore"):
        if name == "float16":
            return values.astype(np.float16).astype(np.float64)
        bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
