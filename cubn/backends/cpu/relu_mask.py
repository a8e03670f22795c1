"""Which y passed a residual ReLU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn._arrays.numpy import address_of
from cubn._types import Extents
from cubn.backends.cpu.parameters import Fields
from cubn.backends.cpu.plan import LANES, WordLayout


class ReluMask(NamedTuple):
    """One bit an element, in 16-bit words along positions, (N, C, words), or along channels, (N, S, words)."""

    words: NDArray[np.uint16]
    address: int
    layout: WordLayout


def new(extents: Extents, layout: WordLayout) -> ReluMask:
    N, rows, length = _rows(extents, layout)
    words = np.empty((N, rows, length), np.uint16)
    return ReluMask(words, address_of(words), layout)


def fields(extents: Extents, layout: WordLayout) -> Fields:
    """Of the parameter block: bytes from sample to sample, and from row to row."""
    _, rows, length = _rows(extents, layout)
    along = "relu_mask_position" if layout == "nhwc" else "relu_mask_channel"
    return {"relu_mask_sample": 2 * rows * length, along: 2 * length}


def _rows(extents: Extents, layout: WordLayout) -> tuple[int, int, int]:
    """Samples, rows of a sample, words of a row."""
    N, C, S = extents
    return (N, S, -(-C // LANES)) if layout == "nhwc" else (N, C, -(-S // LANES))
