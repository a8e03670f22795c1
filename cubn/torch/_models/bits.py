"""Tensors compared bit by bit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Difference(NamedTuple):
    """The size of a difference; both 0 where there is none."""

    max_abs: float
    """Infinite where a NaN or an infinity stands against another value."""
    max_ulp: int
    """Floating-point numbers of the type from one to the other; 0 for other types. -0 is next to +0."""

    def or_larger(self, other: Difference) -> Difference:
        return Difference(max(self.max_abs, other.max_abs), max(self.max_ulp, other.max_ulp))


NONE = Difference(0.0, 0)


def is_dense(a: Tensor) -> bool:
    """Whether it has bits that can be compared: it is not sparse, nested or quantized."""
    return a.layout == torch.strided and not a.is_quantized and not a.is_nested


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and all bits agree: a NaN is itself, and -0 is not +0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def difference(a: Tensor, b: Tensor) -> Difference:
    """Between tensors of one shape and dtype whose bits differ."""
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a.detach(), b.detach()))
    differs = _bits(a) != _bits(b)
    a, b = a[differs], b[differs]
    distance = (a.double() - b.double()).abs()
    max_abs = float(distance.nan_to_num(nan=math.inf, posinf=math.inf).max())
    return Difference(max_abs, _ulps(a, b) if a.is_floating_point() else 0)


def _ulps(a: Tensor, b: Tensor) -> int:
    a, b = _ordered(a), _ordered(b)
    steps = torch.maximum(a, b) - torch.minimum(a, b)
    return int(torch.where(steps < 0, torch.iinfo(torch.int64).max, steps).max())  # negative: beyond int64


def _ordered(a: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers, one apart where these are neighbours."""
    bits = _bits(a)
    magnitude = bits.long() & torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, -1 - magnitude, magnitude)


def _bits(a: Tensor) -> Tensor:
    a = a.detach()
    if a.is_complex():
        a = torch.view_as_real(a.resolve_conj())
    return a.resolve_neg().view(_INTEGERS[a.element_size()])
