"""Operands that are not in x's layout, but in the other fast one: kernels have them in the workspace, in x's layout,
and a stage before or after them copies. That is several times faster than the general kernels, and as exact.
"""

from __future__ import annotations

import math

from cubn._types import ITEMSIZE, Extents, Operand, Operands
from cubn.backends.cpu import plan
from cubn.backends.cpu.parameters import RANGES, Fields, of_operand
from cubn.backends.cpu.pool import Stage
from cubn.backends.cpu.stages import Elements, Part, kernel, layout_of

READ, WRITTEN = ("g",), ("y", "r")


def in_one_layout(elements: Elements) -> Elements:
    """The same with what is in the other fast layout than x `relaid`, if kernels of x's layout can take it then."""
    extents, operands = elements.extents, elements.operands
    if layout_of(elements) != "strided" or operands.mask:
        return elements
    x = operands.x
    layout = plan.layout_of(extents, Operands(x), elements.relu_mask)
    relaid = tuple(
        (name, operand)
        for name in (*READ, *WRITTEN)
        if (operand := getattr(operands, name)) and plan.layout_of(extents, Operands(x, operand)) != layout
    )
    if layout == "strided" or any(plan.layout_of(extents, Operands(o)) == "strided" for _, o in relaid):
        return elements
    dense = _dense(extents, x.dtype, layout)
    return elements._replace(operands=operands._replace(**{name: dense for name, _ in relaid}), relaid=relaid)


def _dense(extents: Extents, dtype: str, layout: plan.Layout) -> Operand:
    """An operand that fills a block of memory."""
    _, C, S = extents
    channel, position = (S, 1) if layout == "nchw" else (1, C)
    return Operand(0, dtype, C * S, channel, (S,), (position,))


def copies(elements: Elements) -> tuple[Part, Part]:
    """Those before kernels that read, and those after kernels that write; and the room of both."""
    return _copies(elements, READ), _copies(elements, WRITTEN)


def _copies(elements: Elements, names: tuple[str, ...]) -> Part:
    extents, dtype = elements.extents, elements.dtype
    stages: tuple[Stage, ...] = ()
    fields: Fields = {}
    room: Fields = {}
    for name, operand in elements.relaid:
        if name in names:
            tasks, block = plan.relaid_tasks(extents, ITEMSIZE[dtype])
            threads = plan.threads_for(elements.nbytes, tasks, elements.threads)
            layout = plan.layout_of(extents, Operands(operand))
            stages += (Stage(kernel("relayout", dtype, name, layout), threads),)
            fields |= of_operand(f"{name}_given", operand)
            fields |= {"relaid_tasks": tasks, "relaid_ranges": min(threads, RANGES), "relaid_block": block}
            room[name] = math.prod(extents) * ITEMSIZE[dtype]
    return Part(stages, fields, room)
