"""Which kernels can read and write given operands, and whether in whole vectors."""

from __future__ import annotations

from collections.abc import Sequence

from cubn._types import ITEMSIZE, Extents, Operand, Operands
from cubn.backends.cuda.plan.launch import OCTET, VECTOR_BYTES, Launch, Layout, given


def layout_of(extents: Extents, operands: Operands, relu_mask: Layout | None = None) -> Layout:
    """What all operands have in common, and a relu mask that is to be read.

    "nchw": neighbouring positions are neighbours in memory. "nhwc", to which 2-D belongs: neighbouring channels are,
    and positions go on with one step. "strided": anything else, and whatever comes with a mask.
    """
    layout = _common(extents, operands)
    return layout if relu_mask in (None, layout) else "strided"


def _common(extents: Extents, operands: Operands) -> Layout:
    _, C, S = extents
    if operands.mask:
        return "strided"
    if S > 1 and all(o.position_strides == (1,) for o in given(operands)):
        return "nchw"
    if all((o.channel_stride == 1 or C == 1) and len(o.position_strides) <= 1 for o in given(operands)):
        return "nhwc"
    return "strided"


def position_step(o: Operand) -> int:
    """Elements from one position to the next; with one position, from one sample to the next."""
    return o.position_strides[0] if o.position_strides else o.sample_stride


def elementwise_layout(extents: Extents, operands: Operands, relu_mask: Layout | None = None) -> Layout:
    """`layout_of` for the elementwise kernels: octets stay within a row of positions or channels, or all are linear."""
    layout = layout_of(extents, operands, relu_mask)
    if layout == "nhwc" and not all(goes_on(extents, o) for o in given(operands)):
        return "strided"
    whole = {"nchw": extents.S, "nhwc": extents.C, "strided": 0}[layout] % OCTET == 0
    return layout if whole or all(is_linear(extents, o, layout) for o in given(operands)) else "strided"


def is_linear(extents: Extents, o: Operand, layout: Layout) -> bool:
    """Whether the operand fills its memory in the order of its layout, (n, c, p) or (n, p, c)."""
    N, C, S = extents
    if layout == "nchw":
        return (C == 1 or o.channel_stride == S) and (N == 1 or o.sample_stride == C * S)
    step = position_step(o)
    return (N * S == 1 or step == C) and goes_on(extents, o)


def goes_on(extents: Extents, o: Operand) -> bool:
    """Whether the step from one position to the next leads from a sample's last to the next sample's first as well."""
    return extents.N == 1 or extents.S == 1 or o.sample_stride == extents.S * position_step(o)


def octets_are_vectors(launch: Launch, o: Operand) -> bool:
    """Whether all octets that a kernel reads of an operand begin at multiples of 16 bytes."""
    steps = {"nchw": (o.sample_stride, o.channel_stride), "nhwc": (position_step(o), o.sample_stride), "linear": ()}
    return are_vectors(o, steps[launch.octets])


def is_dense(launch: Launch, extents: Extents, operands: Operands) -> bool:
    """Whether all octets of all operands are vectors; and, but for the channels of a thread, all are in one order."""
    if not launch.octets or (
        launch.octets == "nchw" and not all(is_linear(extents, o, "nchw") for o in given(operands))
    ):
        return False
    return all(octets_are_vectors(launch, o) for o in given(operands))


def are_vectors(o: Operand, steps: Sequence[int], size: int = VECTOR_BYTES) -> bool:
    """Whether addresses that start from the operand's and go on in these steps are multiples of `size` bytes."""
    item = ITEMSIZE[o.dtype]
    return not (o.pointer % size or any(step * item % size for step in steps))
