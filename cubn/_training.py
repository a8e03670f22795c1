"""A training forward with every check: its arguments, its outputs, what it computes and leaves for others like it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple, get_args

from cubn import _calls
from cubn._arguments import flag, one_of
from cubn._calls import Call
from cubn._inputs import bind, overwrites, relu_gradient
from cubn._state.holding import NO_STATISTICS, Move
from cubn._types import Affine, Nodes, NormalizeOptions, Statistics
from cubn.backends.protocol import PreparedTrain, ReluMask
from cubn.errors import message
from cubn.saved import Forward, Groups, Layouts, Read, Saved
from cubn.state import BatchNormState
from cubn.sync.collective import Gathered, SyncContext, Terms
from cubn.typing import OnSingle

TRAININGS = _calls.new_store()
ON_SINGLE: tuple[OnSingle, ...] = get_args(OnSingle)


class Facts(NamedTuple):
    """What of a training forward does not differ between calls with one signature."""

    layouts: Layouts
    updates: bool
    values: int
    """Values per channel; with a mask, of each position that it lets through."""


class Training:
    """A forward_train whose arguments were checked and whose output is ready; nothing is changed yet."""

    def __init__(
        self,
        x: Any,
        state: BatchNormState,
        mask: Any,
        residual: Any,
        relu: bool,
        update: bool,
        out: Any,
        on_single: OnSingle = "raise",
    ) -> None:
        self.on_single = one_of(ON_SINGLE, on_single, "on_single")
        relu = flag(relu, "relu")
        update = flag(update, "update")
        self.inputs = inputs = bind(x, state, mask, residual)
        self.state = state
        self.eps, self.how = state.eps, state._options.how_to_update  # which may have changed before `finish`
        self.updates = update and state._counters is not None
        if self.updates:
            state._check_updatable(inputs.held)
        if on_single == "running" and inputs.held.running is None:
            rule, remedy = "have running statistics, for on_single='running'", "Make the state with track=True."
            raise ValueError(message("state", rule, NO_STATISTICS, remedy))
        self.output = inputs.destination(out)
        self.given = None if out is None else self.output.array
        self.overwrites = overwrites(out, self.output, inputs.x)
        self.backend = inputs.backend
        self.operands = inputs.operands(self.output.array)
        self.layouts = Layouts.of(inputs, relu_gradient(relu, residual is not None))
        self.options = NormalizeOptions(residual is not None, relu, keep_mask=self.layouts.relu == "mask")
        self.asked = relu, update
        self.values = inputs.values

    @property
    def is_single(self) -> bool:
        """Whether this is one value per channel, to be normalised by running statistics."""
        return self.values == 1 and self.on_single == "running"

    def check_count(self) -> None:
        """Raise unless this batch is enough by itself."""
        if self.values is None or self.values > 1:
            return
        array, mask = self.inputs.x, self.inputs.mask
        got = f"{self.values} where the mask is True" if mask else self.values
        _check_count(self.values, got, "", shape=array.shape, dtype=array.dtype, device=array.device)

    def run(self) -> tuple[Any, Saved[Any]]:
        """The whole step at once. y is its library's before the state is changed for good: an adoption may fail."""
        held, state = self.inputs.held, self.state
        if not self.updates:
            return self._train(None, None)
        with state._turn(), state._moving(held) as move:
            after = move.in_place and self.output.array.library.adopts
            return self._train(None, move) if after else self._train(move, None)

    def by_running(self) -> tuple[Any, Saved[Any]]:
        """As forward_frozen does."""
        self._check_turn()
        statistics = self.backend.new_statistics(self.inputs.extents.C, self.inputs.held.affine)
        self.backend.keep(self.inputs.held.affine, statistics)
        return self._by_running(statistics, None)

    def _by_running(self, statistics: Statistics, context: SyncContext | None) -> tuple[Any, Saved[Any]]:
        """With statistics that have copies of gamma and beta. The update, by a count of 0, is a skipped one."""
        running, affine = self.state._now(self.inputs.held).running, statistics.affine
        assert running
        self.backend.frozen_statistics(running, self.eps, statistics)
        relu_mask = self.backend.normalize(self.inputs.extents, self.operands, statistics, affine, self.options)
        y = self.output.finish()
        if self.updates:
            self._update(statistics)
        return y, self.saved(statistics, relu_mask, context, frozen=True)

    def _check_turn(self) -> None:
        """Raise where this is in the midst of the state's update, before y is written and not behind it."""
        if self.updates:
            self.state._turn()

    def _update(self, statistics: Statistics) -> None:
        """Move the running statistics, y being its library's."""
        with self.state._turn(), self.state._moving(self.inputs.held) as move:
            self.backend.update(statistics, move.old, move.new, move.counters, self.how)

    def _train(self, move: Move | None, after: Move | None) -> tuple[Any, Saved[Any]]:
        """One launch, in which running statistics move too, or do so after y is its library's."""
        extents, held = self.inputs.extents, self.inputs.held
        running, biased = (move.old, move.update.biased) if move else (None, False)
        prepared = self.backend.prepare_train(extents, self.operands, held.affine, running, biased, self.options)
        gamma, beta, *_ = held.addresses
        moves: tuple[Any, ...] = ()
        if move:
            vectors = (*move.old, *move.new)
            moves = (*(vector.pointer for vector in vectors), *move.counters, move.update.momentum)
        x, residual, y, _, mask = (operand.pointer if operand else 0 for operand in self.operands)
        statistics, relu_mask = prepared(x, residual, y, mask, gamma, beta, self.eps, *moves)
        if not after:
            self._remember(prepared)
        result = self.output.finish()
        if after:
            self.backend.update(statistics, *after)
        return result, self.saved(statistics, relu_mask)

    def _remember(self, prepared: PreparedTrain) -> None:
        """For calls that have the same signature, and in which nothing of this one's own is left to be asked."""
        inputs = self.inputs
        N, _, S = inputs.extents
        mask = inputs.mask
        if self.values is None or (mask and mask.library is not inputs.x.library):
            return  # only the device, or another library, knows how many values there are
        each = N * S // max(1, math.prod(mask.shape)) if mask else N * S
        facts = Facts(self.layouts, self.updates, each)
        call = Call(prepared, facts, inputs.x, self.output.array, (inputs.x, inputs.residual_or_dy), (mask,))
        _calls.remember(TRAININGS, call, inputs, self.state, self.given, *self.asked)

    def saved(
        self,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        context: SyncContext | None = None,
        *,
        frozen: bool = False,
        groups: Groups | None = None,
    ) -> Saved[Any]:
        inputs = self.inputs
        return Saved._of(
            Forward(
                self.layouts,
                Read.of(inputs.x),
                inputs.mask and Read.of(inputs.mask),
                inputs.held,
                statistics,
                relu_mask,
                frozen,
                self.overwrites,
                context,
                groups,
            )
        )


class SynchronisedTraining(Training):
    """A forward_train over several ranks; gamma and beta are those it began with."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        affine = self.inputs.held.affine
        self.statistics = self._new_statistics(self.inputs.extents.C, affine)
        self.backend.keep(affine, self.statistics)

    def _new_statistics(self, C: int, affine: Affine) -> Statistics:
        return self.backend.new_statistics(C, affine)

    @cached_property
    def terms(self) -> Terms:
        N, C, _ = self.inputs.extents
        on = {"update": self.updates, "relu": self.options.relu, "residual": self.options.residual}
        on["biased"] = self.updates and self.how.biased
        on["on_single=running"] = self.on_single == "running"
        return Terms(
            "forward_train",
            C,
            N,
            self.inputs.x.dtype,
            self.eps,
            self.how.momentum,
            values=2 if self.values is None else self.values,
            options=frozenset(name for name in on if on[name]),
        )

    def part(self, start: int, total: int) -> Nodes:
        return self.backend.moments(self.inputs.extents, self.operands, start)

    def accept(self, values: int) -> None:
        self.values_of_all = values
        if not self.is_single:
            _check_count(values, values, " over all ranks")

    @property
    def is_single(self) -> bool:
        return self.values_of_all == 1 and self.on_single == "running"

    def finish(self, gathered: Gathered) -> tuple[Any, Saved[Any]]:
        if self.is_single:
            return self._by_running(self.statistics, gathered.context)
        return self._normalized(gathered)

    def _normalized(self, gathered: Gathered) -> tuple[Any, Saved[Any]]:
        backend = self.backend
        statistics = backend.statistics(*backend.root(gathered.nodes), self.eps, self.statistics)
        relu_mask = backend.normalize(self.inputs.extents, self.operands, statistics, statistics.affine, self.options)
        y = self.output.finish()
        if self.updates:
            self._update(statistics)
        return y, self.saved(statistics, relu_mask, gathered.context)


def _check_count(count: int, got: object, where: str, **facts: Any) -> None:
    """Training needs two values per channel."""
    if count > 1:
        return
    if count:
        rule = f"have more than one value per channel{where}"
        remedy = (
            "The variance of one value is 0, so its y would be beta whatever it is: use a larger batch, or forward or "
            "forward_frozen, which use the running statistics."
        )
    else:
        rule = f"have values to take statistics of{where}"
        remedy = "Skip the empty batch, or use forward, which takes one and returns an empty y."
    raise ValueError(message("x", rule, got, remedy, **facts))
