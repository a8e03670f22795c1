"""From shape and strides to samples, channels and positions. Pure functions; strides are in elements."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

from cubn._types import ITEMSIZE, Extents, Operand, Operands, Vector
from cubn.errors import message

Shape = tuple[int, ...]
Strides = tuple[int, ...]

_MOST = 1 << 60  # elements, and steps between them, whose bytes an int64 counts


class Described(Protocol):
    """An array, as far as its layout goes."""

    @property
    def pointer(self) -> int: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def strides(self) -> Strides: ...

    @property
    def dtype(self) -> str: ...


class Unaddressable(ValueError):
    """A shape or strides of no array in memory."""


def channel_position(ndim: int, channel_axis: int) -> int:
    """The channel axis counted from the front; a NumPy AxisError if there is no such axis."""
    if -ndim <= channel_axis < ndim:
        return channel_axis % ndim
    from numpy.exceptions import AxisError

    raise AxisError(
        message("channel_axis", f"be at least {-ndim} and below {ndim}, x having {ndim} axes", channel_axis)
    )


@lru_cache(maxsize=1024)
def extents(shape: Shape, axis: int) -> Extents:
    """N, C, S: samples are the first axis that is not the channel's, positions are the rest."""
    n, *rest = shape[:axis] + shape[axis + 1 :]
    return Extents(n, shape[axis], math.prod(rest))


def operand(array: Described, axis: int) -> Operand:
    """The array as a kernel sees it."""
    return Operand(array.pointer, array.dtype, *_steps(array.shape, array.strides, axis))


def mask_operand(mask: Described, shape: Shape, axis: int) -> Operand | None:
    """The mask over an x of this shape as a kernel sees it, or None if it does not fit.

    A mask has x's shape without the channel axis, or x's rank with 1 there; its other extents are x's or 1.
    """
    steps = _mask_steps(mask.shape, mask.strides, shape, axis)
    return steps and Operand(mask.pointer, mask.dtype, *steps)


def from_sample(n: int, operands: Operands) -> Operands:
    """The operands but for the n samples before."""
    return Operands(
        *[o and o._replace(pointer=o.pointer + n * o.sample_stride * ITEMSIZE[o.dtype]) for o in operands]  # type: ignore[arg-type]
    )


def vector(array: Described) -> Vector:
    """A per-channel array as a kernel sees it."""
    return Vector(array.pointer, array.dtype, array.strides[0])


def c_strides(shape: Shape) -> Strides:
    """Strides of a C-contiguous array."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=1024)
def is_dense(shape: Shape, strides: Strides) -> bool:
    """Whether the elements fill a block of memory, each once, in some order of the axes, all forwards."""
    step = 1
    for stride, extent in sorted(_axes(shape, strides)):
        if stride != step:
            return False
        step *= extent
    return True


@lru_cache(maxsize=1024)
def output_strides(shape: Shape, strides: Strides) -> Strides:
    """Strides of an output beside an input: the input's own where it is dense, else C-contiguous.

    Without elements, it is dense if it were with one along every empty axis; steps of 0 then say nothing, for torch
    takes them over what is empty, and NumPy everywhere.
    """
    steps = [(n, step) for n, step in zip(shape, strides, strict=True) if step or 0 not in shape]
    return strides if is_dense(tuple(n for n, _ in steps), tuple(step for _, step in steps)) else c_strides(shape)


@lru_cache(maxsize=1024)
def span(shape: Shape, strides: Strides) -> tuple[int, int]:
    """Elements from the first one, in memory: the lowest, and one past the highest. (0, 0) without elements.

    Raises
    ------
    Unaddressable
        If an extent is negative, or bytes could not be counted.
    """
    if min(shape, default=0) < 0 or math.prod(max(extent, 1) for extent in shape) >= _MOST:
        raise Unaddressable(f"shape {shape}")
    if any(abs(stride) >= _MOST for stride in strides):
        raise Unaddressable(f"strides {strides}")
    if 0 in shape:
        return 0, 0
    reach = [stride * (extent - 1) for stride, extent in zip(strides, shape, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + 1


@lru_cache(maxsize=1024)
def is_distinct(shape: Shape, strides: Strides) -> bool:
    """Whether every element surely has memory of its own, so that it can be written: none is broadcast."""
    if 0 in shape:
        return True
    reach = 0
    for stride, extent in sorted((abs(stride), extent) for stride, extent in _axes(shape, strides)):
        if stride <= reach:
            return False
        reach += stride * (extent - 1)
    return True


def _axes(shape: Shape, strides: Strides) -> list[tuple[int, int]]:
    """(stride, extent) of the axes along which there is a step to take."""
    return [(stride, extent) for stride, extent in zip(strides, shape, strict=True) if extent > 1]


@lru_cache(maxsize=1024)
def _steps(shape: Shape, strides: Strides, axis: int) -> tuple[int, int, Shape, Strides]:
    """Sample and channel stride, position shape and strides: extents of 1 dropped, axes that step as one merged."""
    sample = 1 if axis == 0 else 0
    rest = [i for i in range(len(shape)) if i not in (sample, axis)]
    position: list[tuple[int, int]] = []
    if not math.prod(shape[i] for i in rest):
        return strides[sample], strides[axis], (0,), (1,)
    for stride, extent in _axes(tuple(shape[i] for i in rest), tuple(strides[i] for i in rest)):
        if position and position[-1][0] == stride * extent:
            extent *= position.pop()[1]
        position.append((stride, extent))
    return strides[sample], strides[axis], tuple(e for _, e in position), tuple(s for s, _ in position)


@lru_cache(maxsize=1024)
def _mask_steps(
    mask_shape: Shape, mask_strides: Strides, shape: Shape, axis: int
) -> tuple[int, int, Shape, Strides] | None:
    """`_steps` of a mask broadcast to x's shape, or None if it does not fit."""
    if len(mask_shape) == len(shape) - 1:
        mask_shape = (*mask_shape[:axis], 1, *mask_shape[axis:])
        mask_strides = (*mask_strides[:axis], 0, *mask_strides[axis:])
    if len(mask_shape) != len(shape) or mask_shape[axis] != 1:
        return None
    if any(have not in (1, want) for have, want in zip(mask_shape, shape, strict=True)):
        return None
    steps = tuple(0 if extent == 1 else stride for stride, extent in zip(mask_strides, mask_shape, strict=True))
    return _steps(shape, steps, axis)
