"""Other contracts than docs/numerics.md's, for what they would save: kernels are changed before they are compiled.

Their results are other bits, which nothing here looks at.
"""

import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cycle_tables import TODAY

from cubn.backends.cpu import arithmetic, kernels
from cubn.backends.cpu.arithmetic import Coefficients, Moments, Node, Term, divided
from cubn.backends.cpu.simd import Value, constant

PACKAGE = kernels.__name__.rpartition(".")[0]


class Contract(NamedTuple):
    """How kernels are changed, as functions and as LLVM IR, and the titles of what changes."""

    change: Callable[[], object] = lambda: None
    edit: Callable[[str], str] = str
    only: str = ""
    samples_as_positions: bool = False


def one_mean() -> None:
    """x - mean with the mean as one number."""
    _replace("centre", lambda x, c: x - c.high)


def folded() -> None:
    """y = x * scale + shift, the mean within the shift."""

    def normalized(x: Value, c: Coefficients, exact_mean: bool = False) -> Value:
        return x * c.scale + c.beta

    _replace("normalized", normalized)


def one_pass() -> None:
    """The m2 of a leaf from the sum of its squares about the pivot."""

    def leaf(rows: Sequence[Term]) -> Node:
        (total,), *others = rows
        if not others:
            return total, constant(total, 0.0)
        squares = total * total
        for (v,) in others:
            total, squares = total + v, squares + v * v
        mean = divided(total, len(rows))
        return mean, squares - total * mean

    Moments.leaf = staticmethod(leaf)  # type: ignore[method-assign]


def _replace(name: str, function: Callable[..., Value]) -> None:
    """Put another function in the place of one of `arithmetic`, wherever it was imported to."""
    old = getattr(arithmetic, name)
    for module in [module for key, module in sys.modules.items() if key.startswith(PACKAGE)]:
        if getattr(module, name, None) is old:
            setattr(module, name, function)


def fused(text: str) -> str:
    """Products that are added to something are not rounded."""
    return re.sub(r"= (fadd|fsub|fmul) ", r"= \1 contract ", text)


PASSES, SUMS_AND_PASSES, MOMENTS = "^(normalize|input)", "^(normalize|input|sums)", "^moments n(chw|hwc )"
CONTRACTS = {
    TODAY: Contract(),
    "fused": Contract(edit=fused),
    "mean of one number": Contract(one_mean, only=SUMS_AND_PASSES),
    "mean of one number, fused": Contract(one_mean, fused, SUMS_AND_PASSES),
    "x · scale + shift, fused": Contract(folded, fused, "^normalize"),
    "leaf of one pass": Contract(one_pass, only=MOMENTS),
    "leaf of one pass, fused": Contract(one_pass, fused, MOMENTS),
    "samples in tiles": Contract(only="^(moments|sums)", samples_as_positions=True),
    "samples in tiles, fused": Contract(edit=fused, only="^(moments|sums)", samples_as_positions=True),
}
