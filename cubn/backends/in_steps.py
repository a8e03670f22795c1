"""Operations of a backend one after the other, where it has no single launch for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from cubn._types import Affine, BackendArray, Extents, NormalizeOptions, Operands, Running, Statistics, Vector
from cubn.backends.protocol import Backend, ReluMask


class FrozenInSteps:
    """`Backend.prepare_frozen` by `keep`, `frozen_statistics` and `normalize`."""

    __slots__ = ("_C", "_affine", "_backend", "_normalize", "_running")

    def __init__(
        self,
        backend: Backend,
        extents: Extents,
        operands: Operands,
        affine: Affine,
        running: Running,
        options: NormalizeOptions,
    ) -> None:
        copies = Affine(*(vector and Vector(0, "float64", 1) for vector in affine))
        self._backend, self._C, self._affine, self._running = backend, extents.C, affine, running
        self._normalize = backend.prepare_normalize(extents, operands, copies, options)

    def __call__(
        self, x: int, residual: int, y: int, mask: int, gamma: int, beta: int, mean: int, var: int, eps: float, /
    ) -> tuple[Statistics, ReluMask | None]:
        place, (of_gamma, of_beta) = self._backend, self._affine
        affine = Affine(of_gamma and of_gamma._replace(pointer=gamma), of_beta and of_beta._replace(pointer=beta))
        running = Running(self._running.mean._replace(pointer=mean), self._running.var._replace(pointer=var))
        statistics = place.new_statistics(self._C, affine)
        place.keep(affine, statistics)
        place.frozen_statistics(running, eps, statistics)
        copies = (vector.pointer if vector else 0 for vector in statistics.affine)
        return statistics, self._normalize(x, residual, y, mask, statistics, *copies)


def below(tables: Sequence[BackendArray], backend: Backend) -> BackendArray:
    """Copies of dense tables of one width, one below the other."""
    if backend.device is None:
        return np.concatenate(tables)
    flat = backend.device.beside([table.reshape(1, -1) for table in tables])
    return flat.reshape(-1, tables[0].shape[1])


def stacked(
    name: Literal["count", "mean", "var", "invstd"], each: Sequence[Statistics], backend: Backend
) -> BackendArray:
    """Copies of what statistics of one stream have by a name, one below the other: (G, C), of counts (G, 1)."""
    device, before = backend.device, each[0].stream
    rows = [getattr(statistics, name).reshape(1, -1) for statistics in each]
    if device is None or before is None or before is device.stream():
        return below(rows, backend)
    device.wait_for(before)
    joined = below(rows, backend)
    device.hold(*rows)
    return joined
