"""Launches but for their addresses: what follows from extents, layouts and options is worked out once and kept.

A layout is the operand as it would be at the lowest address that is as far past a multiple of 16 bytes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from cubn._types import Extents, Operand, Operands
from cubn.backends.cuda import plan
from cubn.backends.cuda.parameters import of_operand, of_scattered, pack
from cubn.backends.cuda.plan import VECTOR_BYTES, Launch, Limits


def layouts(arrays: Operands) -> Operands:
    return Operands(*(o and _layout(o) for o in arrays))  # type: ignore[arg-type]


def _layout(o: Operand) -> Operand:
    return Operand(o.pointer % VECTOR_BYTES, *o[1:])


def _values(arrays: Operands) -> dict[str, Operand]:
    """Those that are there, but for the mask."""
    return {name: o for name, o in arrays._asdict().items() if o is not None and name != "mask"}


class Ready(NamedTuple):
    """A launch and its parameters, addresses left out."""

    launch: Launch
    words: bytes
    kind: str = ""  # of the kernels that read or write every element


class Reduction(NamedTuple):
    """Launches that leave `rows` rows of nodes, then fewer, then the root and what follows from it."""

    reduce: Ready
    rows: int
    merges: tuple[tuple[Ready, int], ...]
    finish: Ready


def _ready(launch: Launch, arrays: Operands | None = None, kind: str = "", **more: int) -> Ready:
    fields: dict[str, int | float] = {**dict(launch.fields), **more}
    if arrays:
        for name, o in _values(arrays).items():
            steady = launch.octets and of_operand(name, o, plan.octets_are_vectors(launch, o))
            fields |= steady or of_scattered(name, o)
        if arrays.mask:
            fields |= of_scattered("mask", arrays.mask)
    return Ready(launch, bytes(pack(fields)), kind)


@functools.lru_cache(1024)
def channelwise(kernel: str, C: int, dtype: str) -> Ready:
    return _ready(plan.channelwise(kernel, C, dtype))


@functools.lru_cache(1024)
def elementwise(extents: Extents, options: tuple[str, ...], bits: str, limits: Limits, arrays: Operands) -> Ready:
    """`bits`: the kind of those to be read, if any."""
    operands = tuple(_values(arrays).values())
    kind = "strided" if arrays.mask else plan.elementwise_kind(extents, operands)
    if bits and bits != kind:
        kind = "strided"
    launch = plan.elementwise(extents, kind, arrays.x.dtype, options, limits)
    dense = bool(launch.octets) and plan.is_dense(launch, extents, operands)
    return _ready(launch, arrays, kind, dense=int(dense))


@functools.lru_cache(1024)
def resident(
    extents: Extents, options: tuple[str, ...], staged: int, keep_bits: bool, bits: str, limits: Limits, arrays: Operands
) -> Ready | None:
    """One kernel for a whole training step or gradient, if there is. `bits`: the kind of those to be read, if any."""
    operands = _values(arrays)
    kind = plan.kind_of(extents, tuple(operands.values()))
    if arrays.mask or (bits and bits != kind):
        return None
    if kind == "channels":
        launch = plan.slab_channels(extents, operands, staged, options, keep_bits or bool(bits), limits)
    else:
        launch = plan.slab(extents, operands, staged, options, keep_bits, limits)
    if launch is None:
        return None
    return _ready(launch, arrays, kind, dense=int(plan.is_dense(launch, extents, tuple(operands.values()))))


@functools.lru_cache(1024)
def reduction(extents: Extents, what: str, gate: str, bits: str, limits: Limits, arrays: Operands) -> Reduction:
    """`bits`: the kind of those to be read, if any."""
    operands = tuple(_values(arrays).values())
    kind = "strided" if arrays.mask else plan.kind_of(extents, operands)
    if bits and bits != kind:
        kind = "strided"
    cut = plan.reduction(extents, kind, what, gate, arrays.x.dtype, plan.vector_of(extents, operands), limits)
    left = cut.merges[-1][1] if cut.merges else cut.rows
    return Reduction(
        _ready(cut.reduce, arrays),
        cut.rows,
        tuple((_ready(merge), rows) for merge, rows in cut.merges),
        finish(extents.C, what, left, arrays.x.dtype),
    )


@functools.lru_cache(1024)
def finish(C: int, what: str, rows: int, dtype: str) -> Ready:
    return _ready(plan.finish(C, what, rows, dtype))


@functools.lru_cache(1024)
def merge_rows(C: int, what: str, rows: int) -> Ready:
    """All rows into one."""
    return _ready(plan.merge_rows(C, what, rows, rows))


@functools.lru_cache(1024)
def root(C: int, what: str, merges: tuple[int, ...]) -> Ready:
    """All nodes of a table into one."""
    return _ready(plan.root(C, what, merges))
