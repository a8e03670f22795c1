"""Which kernels can read and write given operands, and whether in whole vectors."""

from __future__ import annotations

from collections.abc import Sequence

from cubn._types import Extents, ITEMSIZE, Operand
from cubn.backends.cuda.plan.launch import OCTET, VECTOR_BYTES, Launch


def kind_of(extents: Extents, operands: Sequence[Operand]) -> str:
    """Which kernels can read and write all operands.

    "rows": neighbouring positions are neighbours in memory (nchw). "channels": neighbouring channels are, and positions
    go on with one step from sample to sample (nhwc, 2-D). "strided": anything else.
    """
    _, C, S = extents
    if S > 1 and all(o.position_strides == (1,) for o in operands):
        return "rows"
    if all((o.channel_stride == 1 or C == 1) and len(o.position_strides) <= 1 for o in operands):
        return "channels"
    return "strided"


def position_step(o: Operand) -> int:
    """Elements from one position to the next; with one position, from one sample to the next."""
    return o.position_strides[0] if o.position_strides else o.sample_stride


def elementwise_kind(extents: Extents, operands: Sequence[Operand]) -> str:
    """`kind_of`, for the elementwise kernels: octets stay within a row of positions or channels, or all are linear."""
    kind = kind_of(extents, operands)
    if kind == "channels" and not all(goes_on(extents, o) for o in operands):
        return "strided"
    whole = {"rows": extents.S, "channels": extents.C}.get(kind, 1) % OCTET == 0
    return kind if whole or all(is_linear(extents, o, kind) for o in operands) else "strided"


def is_linear(extents: Extents, o: Operand, kind: str) -> bool:
    """Whether the operand fills its memory in the order of its kind, (n, c, p) or (n, p, c)."""
    N, C, S = extents
    if kind == "rows":
        return (C == 1 or o.channel_stride == S) and (N == 1 or o.sample_stride == C * S)
    step = position_step(o)
    return (N * S == 1 or step == C) and goes_on(extents, o)


def goes_on(extents: Extents, o: Operand) -> bool:
    """Whether the step from one position to the next leads from a sample's last to the next sample's first as well."""
    return extents.N == 1 or extents.S == 1 or o.sample_stride == extents.S * position_step(o)


def octets_are_vectors(launch: Launch, o: Operand) -> bool:
    """Whether all octets that a kernel reads of an operand begin at multiples of 16 bytes."""
    steps = {"rows": (o.sample_stride, o.channel_stride), "channels": (position_step(o), o.sample_stride), "linear": ()}
    return are_vectors(o, steps[launch.octets])


def is_dense(launch: Launch, extents: Extents, operands: Sequence[Operand]) -> bool:
    """Whether all octets of all operands are vectors; and, but for the channels of a thread, all are in one order."""
    return all(
        octets_are_vectors(launch, o) and (launch.octets != "rows" or is_linear(extents, o, "rows")) for o in operands
    )


def are_vectors(o: Operand, steps: Sequence[int], size: int = VECTOR_BYTES) -> bool:
    """Whether addresses that start from the operand's and go on in these steps are multiples of `size` bytes."""
    item = ITEMSIZE[o.dtype]
    return not (o.pointer % size or any(step * item % size for step in steps))
