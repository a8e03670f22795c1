"""Calls prepared before there are arrays to make them with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from cubn import _layout
from cubn._inputs import relu_gradient
from cubn._types import (
    Affine,
    Extents,
    GradientOptions,
    NormalizeOptions,
    Operand,
    Operands,
    ReluGradient,
    Running,
    Statistics,
    Vector,
)
from cubn.backends.protocol import Backend

VECTOR = Vector(0, "float32", 1)
"""gamma and all other arrays of a layer's channels; no kernel is made for another dtype."""

Layer = tuple[Extents, Operand]
"""Extents and layout of x, which all arrays of a layer share."""


class Calls(NamedTuple):
    """Which are made of a layer."""

    residual: bool
    relu: bool
    training: bool = True
    inference: bool = True


def layer(shape: tuple[int, ...], channel_axis: int, channels_last: bool, dtype: str) -> Layer:
    """One whose x is dense: C-contiguous, or with neighbouring channels as neighbours in memory."""
    axis = _layout.channel_position(len(shape), channel_axis)
    strides = _layout.c_strides(shape)
    if channels_last:
        dense = _layout.c_strides((*shape[:axis], *shape[axis + 1 :], shape[axis]))
        strides = (*dense[:axis], 1, *dense[axis:-1])
    return _layout.extents(shape, axis), _layout.operand(_Described(0, shape, strides, dtype), axis)


class _Described(NamedTuple):
    """An array that is still to be."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def prepare(backend: Backend, layers: Iterable[Layer], calls: Calls) -> None:
    """As the first calls of these layers do."""
    for extents, x in dict.fromkeys(layers):
        second = x if calls.residual else None
        if calls.inference:
            _prepare_forward(backend, extents, x, second, calls.relu)
        if calls.training:
            relu = relu_gradient(calls.relu, calls.residual)
            _prepare_train(backend, extents, x, second, relu)
            _prepare_backward(backend, extents, x, second, relu)


def _prepare_forward(backend: Backend, extents: Extents, x: Operand, residual: Operand | None, relu: bool) -> None:
    options = NormalizeOptions(residual is not None, relu)
    running = Running(VECTOR, VECTOR)
    backend.prepare_forward(extents, Operands(x, residual, x), Affine(VECTOR, VECTOR), running, options)


def _prepare_train(
    backend: Backend, extents: Extents, x: Operand, residual: Operand | None, relu: ReluGradient
) -> None:
    options = NormalizeOptions(residual is not None, relu != "none", relu == "mask")
    running = Running(VECTOR, VECTOR)
    backend.prepare_train(extents, Operands(x, residual, x), Affine(VECTOR, VECTOR), running, False, options)
    backend.prepare_update(extents.C, running, running, False)  # by itself, where arrays cannot be written


class _ReluMask(NamedTuple):
    """One that is still to be: a backward is prepared for its layout alone."""

    layout: str


def _prepare_backward(
    backend: Backend, extents: Extents, x: Operand, dresidual: Operand | None, relu: ReluGradient
) -> None:
    statistics = Statistics(None, 0, extents.C, True, True)
    mask: Any = None
    if relu == "mask":
        mask = _ReluMask("nchw" if x.position_strides == (1,) else "nhwc")
    options = GradientOptions(relu, False, dresidual is not None)
    backend.prepare_backward(extents, Operands(x, x, x, dresidual), statistics, mask, (VECTOR, VECTOR), options)
