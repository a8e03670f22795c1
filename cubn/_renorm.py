"""Batch renormalisation (Ioffe 2017): a training forward whose gamma and beta make up for what sets the batch's
statistics apart from the running ones.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

from cubn._state.holding import NO_STATISTICS
from cubn._state.options import as_float
from cubn._training import SynchronisedTraining
from cubn._types import Affine, Nodes, Renormalised, Running, Statistics
from cubn.errors import message, quoted
from cubn.saved import Layouts, Saved
from cubn.sync.collective import Gathered, SyncContext, Terms


class Limits(NamedTuple):
    """How far r and d may go."""

    r_max: float
    d_max: float


class RenormalisedTraining(SynchronisedTraining):
    """A forward_train with `renorm=`, over several ranks or on a whole batch."""

    statistics: Renormalised

    def __init__(self, renorm: Any, *arguments: Any) -> None:
        self.renorm = checked_limits(renorm)
        super().__init__(*arguments)
        if self.state._counters is None:
            remedy = "renorm compares the batch with them: make the state with track=True."
            raise ValueError(message("state", "have running statistics", NO_STATISTICS, remedy))
        self.values_of_all = 2 if self.values is None else self.values

    def _new_statistics(self, C: int, affine: Affine) -> Renormalised:
        return self.backend.new_renormalised(C, affine)

    @cached_property
    def terms(self) -> Terms:
        plain = super().terms
        return plain._replace(options=plain.options | {"renorm"}, renorm=self.renorm)

    def run(self) -> tuple[Any, Saved[Any]]:
        return self._finish(self.part(0, self.inputs.extents.N), None)

    def _normalized(self, gathered: Gathered) -> tuple[Any, Saved[Any]]:
        return self._finish(gathered.nodes, gathered.context)

    def _finish(self, nodes: Nodes, context: SyncContext | None) -> tuple[Any, Saved[Any]]:
        """y by the running statistics as they are now; it is its library's before they move."""
        state, held = self.state, self.inputs.held
        if not self.updates:
            running = state._now(held).running
            assert running
            return self._renormalised(nodes, running, context)
        with state._turn(), state._moving(held) as move:
            y, saved = self._renormalised(nodes, move.old, context)
            self.backend.update(saved._forward.statistics, move.old, move.new, move.counters, self.how)
        return y, saved

    def _by_running(self, statistics: Statistics, context: SyncContext | None) -> tuple[Any, Saved[Any]]:
        """With statistics that have no r and d."""
        plain = self.backend.new_statistics(statistics.C, statistics.affine)
        self.backend.keep(statistics.affine, plain)
        return super()._by_running(plain, context)

    def _renormalised(self, nodes: Nodes, running: Running, context: SyncContext | None) -> tuple[Any, Saved[Any]]:
        backend, extents = self.backend, self.inputs.extents
        found = backend.statistics(*backend.root(nodes), self.eps, self.statistics)
        before = backend.new_statistics(extents.C, Affine(None, None))
        backend.frozen_statistics(running, self.eps, before)
        found = backend.renormalise(found, before, *self.renorm)
        self.layouts = Layouts.of(self.inputs, self.layouts.relu, renorm=True)
        relu_mask = backend.normalize(extents, self.operands, found, found.affine, self.options)
        return self.output.finish(), self.saved(found, relu_mask, context)


def checked_limits(renorm: Any) -> Limits:
    """r_max and d_max, either of which may be infinite."""
    if not isinstance(renorm, (tuple, list)) or len(renorm) != 2:
        raise TypeError(message("renorm", "be None or (r_max, d_max), two numbers", quoted(renorm)))
    limits = Limits(*(as_float(limit, f"renorm's {name}") for limit, name in zip(renorm, Limits._fields, strict=True)))
    for name, limit, least in zip(Limits._fields, limits, (1, 0), strict=True):
        if not limit >= least:
            remedy = "(1, 0) is plain batch normalisation, and math.inf no limit."
            raise ValueError(message(f"renorm's {name}", f"be {least} or more", limit, remedy))
    return limits
