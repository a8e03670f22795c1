"""All kernels by name: each claims tasks until none is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cubn.backends.cpu.arithmetic import Moments, Sums
from cubn.backends.cpu.channel_kernels import (
    finish_root,
    for_all,
    gradient_table_of,
    gradients,
    keep,
    table_of,
    update,
    widen_running,
)
from cubn.backends.cpu.elementwise import Backward, Combination, Forward
from cubn.backends.cpu.nodes import Source
from cubn.backends.cpu.pass_kernels import elementwise, elementwise_flat, elementwise_strided, repeat, spread
from cubn.backends.cpu.relayout_kernels import relayout
from cubn.backends.cpu.row_kernels import merge_rows, reduce_rows
from cubn.backends.cpu.simd import Element
from cubn.backends.cpu.slab_kernels import backward_slab, train_slab

Function = Callable[[int, int], None]


FOR_ALL = {"statistics": finish_root, "frozen": widen_running, "keep": keep, "parameter_gradients": gradients}
IN_ACC: dict[str, Callable[[Element], Function]] = {
    "finish": lambda element: for_all(finish_root, table_of(element)),
    "repeat": repeat,
    "spread": spread,
    "tabulate": lambda element: for_all(table_of(element)),
    "tabulate_gradient": lambda element: for_all(gradient_table_of(element)),
    "tabulate_frozen": lambda element: for_all(widen_running, table_of(element)),
}

PASSES = {"normalize": Forward, "input_gradient": Backward, "combination": Combination}


def build(name: str, dtype: str, options: tuple[Any, ...]) -> Function:
    """The kernel called `name`, specialised for a dtype and its options."""
    if name in FOR_ALL:
        return for_all(FOR_ALL[name])
    if name == "update":
        return for_all(update(*options))
    if name == "merge_rows":
        return merge_rows(Moments if options[0] == "moments" else Sums)
    element = Element(dtype)
    if name in IN_ACC:
        return IN_ACC[name](element)
    way, *rest = options
    if name == "relayout":
        return relayout(element, way, *rest)
    if name == "moments":
        return reduce_rows(Source(element, Moments, "none"), way)
    if name == "sums":
        return reduce_rows(Source(element, Sums, *rest), way)
    if name == "train_slab":
        return train_slab(element, way, Forward(*rest))
    if name == "backward_slab":
        return backward_slab(element, way, Backward(*rest))
    what = PASSES[name](*rest)
    if way == "strided":
        return elementwise_strided(element, what)
    return elementwise_flat(element, what) if way == "flat" else elementwise(element, way, what)
