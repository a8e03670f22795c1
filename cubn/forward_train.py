"""The training forward: at once, or in two halves around an exchange with other ranks."""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import Any, NamedTuple

from cubn import _calls
from cubn._arguments import flag
from cubn._arrays.library import ALIGNMENT
from cubn._calls import Call
from cubn._inputs import bind, overwrites, relu_gradient
from cubn._state.arrays import Held
from cubn._state.holding import Move
from cubn._types import Nodes, NormalizeOptions, Statistics
from cubn.backends.protocol import PreparedTrain, ReluMask
from cubn.errors import message
from cubn.saved import Forward, Layouts, Read, Saved, keep
from cubn.state import BatchNormState
from cubn.sync import collective
from cubn.sync.collective import Gathered, Started, SyncContext, Terms, check_sizes
from cubn.typing import AnyArray, ArrayT, Comm, Like, Sizes

_TRAININGS = _calls.new_store()


def forward_train(
    x: ArrayT,
    state: BatchNormState,
    *,
    mask: AnyArray | None = None,
    residual: Like[ArrayT] | None = None,
    relu: bool = False,
    comm: Comm | None = None,
    sizes: Sizes | None = None,
    update: bool = True,
    out: ArrayT | None = None,
) -> tuple[ArrayT, Saved[ArrayT]]:
    """Normalise by the batch's own statistics, and move the running statistics towards them: training.

    y = (x - mean) / sqrt(var + eps) * gamma + beta, then + residual, then ReLU, with mean and var = m2 / count over all
    present values of a channel; running = (1 - momentum) * running + momentum * batch, its variance m2 / (count - 1),
    or m2 / count where the state's `running_variance` is "biased".

    Parameters
    ----------
    x, mask, residual, relu
        As in `forward`. What the mask leaves out takes no part in the statistics.
    state : BatchNormState
        Its running statistics, if it has any, are updated: in place, or replaced where their library is immutable.
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or cubn.sync.Communicator, optional
        The ranks that hold the batch in parts, in rank order; all of them call this, those without samples too.
    sizes : sequence of int, optional
        With `comm`, the number of samples of each rank, where the caller knows them: the statistics are then sent
        without waiting until all ranks have agreed. Ranks that turn out not to agree still raise, but cannot use this
        `comm` any more.
    update : bool
        Whether the state's running statistics are updated.
    out : array like x, optional
        Where y goes: exactly x (then there can be no backward), exactly residual, or memory of its own.

    Returns
    -------
    y : array
        As from `forward`.
    saved : Saved
        For `backward`.

    Raises
    ------
    TypeError, numpy.exceptions.AxisError, BackendUnavailable, ImportError
        As in `forward`.
    ValueError
        As in `forward`, and if there are not at least two values per channel: the variance of one value is 0. Nothing
        is changed then. With `comm` it is the values of all ranks that count, and all of them raise.
    CollectiveMismatch
        With `comm`, on all ranks: if they do not do the same thing, or another one failed. Nothing is changed then.

    Notes
    -----
    The same bits for every layout, number of threads and array library. A channel whose statistics are not finite
    leaves its running statistics as they were, and is counted in `state.skipped`; its y is what IEEE arithmetic gives.
    Running statistics that were not finite take the values of the first batch that is, as in `update`.
    Reads x (and residual) twice from memory at most, and writes y once.

    With `comm`, statistics, running statistics and y are to the bit what one process computes from the ranks' samples
    put together. Two collectives: a header of 64 bytes from each rank, under way while it takes its statistics; then
    16 C + 8 bytes for each aligned power-of-two block of its samples, one block where N is the same power of two
    everywhere. Waits for the other ranks.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch normalization", https://arxiv.org/abs/1502.03167
    Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances"
    """
    if comm is None and sizes is None and (relu is False or relu is True) and (update is True or update is False):
        found = _calls.find(_TRAININGS, x, state, mask, residual, out, relu, update)
        if found is not None:
            done = _again(*found, x, state, mask, residual, out)
            if done is not None:
                return done
    check_sizes("forward_train", sizes, comm)
    if comm is not None:
        return _start(comm, sizes, x, state, mask, residual, relu, update, out).finish()
    training = _Training(x, state, mask, residual, relu, update, out)
    training.check_count()
    return training.run()


def forward_train_start(
    x: ArrayT,
    state: BatchNormState,
    *,
    comm: Comm,
    sizes: Sizes | None = None,
    mask: AnyArray | None = None,
    residual: Like[ArrayT] | None = None,
    relu: bool = False,
    update: bool = True,
    out: ArrayT | None = None,
) -> Started[tuple[ArrayT, Saved[ArrayT]]]:
    """Begin a `forward_train` over the ranks of a communicator, and leave time for other work until its `finish`.

    Takes this rank's statistics and begins to send them; nothing is changed before `finish`.

    Parameters
    ----------
    x, state, comm, sizes, mask, residual, relu, update, out
        As in `forward_train`.

    Returns
    -------
    Started
        Its `finish()` returns what `forward_train` returns.

    Raises
    ------
    TypeError, ValueError, CollectiveMismatch, numpy.exceptions.AxisError, BackendUnavailable, ImportError
        As in `forward_train`; here or in `finish`, but on all ranks in the same place.
    """
    return _start(comm, sizes, x, state, mask, residual, relu, update, out)


def _start(comm: Comm, sizes: Sizes | None, *arguments: Any) -> Started[tuple[Any, Saved[Any]]]:
    return collective.start("forward_train", comm, sizes, partial(_Begun, *arguments))


class _Facts(NamedTuple):
    """What of a training forward does not differ between calls with one signature."""

    layouts: Layouts
    updates: bool
    values: int
    """Values per channel; with a mask, of each position that it lets through."""


_new = tuple.__new__  # of a NamedTuple, in a third of the time


def _again(
    call: Call[PreparedTrain, _Facts],
    held: Held,
    at_x: int,
    at_residual: int,
    at_mask: int,
    at_y: int,
    x: Any,
    state: BatchNormState,
    mask: Any,
    residual: Any,
    out: Any,
) -> tuple[Any, Saved[Any]] | None:
    """A forward_train like one that was made before; None where something is in its way."""
    layouts, updates, values = call.facts
    library = call.library
    if mask is not None and library.count(mask) * values < 2:
        return None
    y = out
    if y is None:
        y, at_y = call.allocate(x)
    if at_y % ALIGNMENT != call.alignment:
        return None
    gamma, beta, mean, var = held.addresses
    if updates:
        lock = state._lock
        if lock._is_owned():  # type: ignore[attr-defined]  # in the midst of an update: the full way says so
            return None
        with lock:
            counters = state._counters
            _, eps, momentum, _, _ = state._options
            if counters is None or counters.device != held.device or state._held is not held:
                return None
            if momentum is not None and not 0 <= momentum <= 1:
                return None
            statistics, relu_mask = call.prepared(
                at_x, at_residual, at_y, at_mask, gamma, beta, eps, mean, var, mean, var, *counters.at, momentum
            )
            if held.versioned:
                held.mark_written()
    else:
        statistics, relu_mask = call.prepared(at_x, at_residual, at_y, at_mask, gamma, beta, state._options.eps)
    counts = library.counts_versions
    if out is not None and counts:
        library.mark_written(out)
    read = _new(Read, (x, at_x, library.version(x) if counts else None, None))
    masked = None
    if mask is not None:
        masked = _new(Read, (mask, at_mask, library.version(mask) if counts else None, None))
    saved = object.__new__(Saved)
    keep(saved, _new(Forward, (layouts, read, masked, held, statistics, relu_mask, False, at_y == at_x, None)))
    return y, saved


class _Training:
    """A forward_train whose arguments were checked and whose output is ready; nothing is changed yet."""

    def __init__(
        self, x: Any, state: BatchNormState, mask: Any, residual: Any, relu: bool, update: bool, out: Any
    ) -> None:
        relu = flag(relu, "forward_train", "relu")
        update = flag(update, "forward_train", "update")
        self.inputs = inputs = bind("forward_train", x, state, mask, residual)
        self.state = state
        self.eps, self.how = state.eps, state._options.how_to_update  # which may have changed before `finish`
        self.updates = update and state._counters is not None
        if self.updates:
            state._check_updatable("forward_train", inputs.held)
        self.output = inputs.destination("forward_train", out)
        self.given = None if out is None else self.output.array
        self.overwrites = overwrites(out, self.output, inputs.x)
        self.backend = inputs.backend
        self.operands = inputs.operands(self.output.array)
        self.layouts = Layouts.of(inputs, relu_gradient(relu, residual is not None))
        self.options = NormalizeOptions(residual is not None, relu, keep_mask=self.layouts.relu == "mask")
        self.asked = relu, update
        self.values = inputs.values

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
        with state._turn("forward_train"), state._moving("forward_train", held) as move:
            after = move.in_place and self.output.array.library.adopts
            return self._train(None, move) if after else self._train(move, None)

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
        facts = _Facts(self.layouts, self.updates, each)
        call = Call(prepared, facts, inputs.x, self.output.array, (inputs.x, inputs.beside), (mask,))
        _calls.remember(_TRAININGS, call, inputs, self.state, self.given, *self.asked)

    def saved(
        self, statistics: Statistics, relu_mask: ReluMask | None, context: SyncContext | None = None
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
                overwritten=self.overwrites,
                context=context,
            )
        )


class _Begun(_Training):
    """A forward_train over several ranks; gamma and beta are those it began with."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        affine = self.inputs.held.affine
        self.statistics = self.backend.new_statistics(self.inputs.extents.C, affine)
        self.backend.keep(affine, self.statistics)

    @cached_property
    def terms(self) -> Terms:
        N, C, _ = self.inputs.extents
        on = {"update": self.updates, "relu": self.options.relu, "residual": self.options.residual}
        on["biased"] = self.updates and self.how.biased
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

    def part(self, start: int) -> Nodes:
        return self.backend.moments(self.inputs.extents, self.operands, start)

    def accept(self, values: int) -> None:
        _check_count(values, values, " over all ranks")

    def finish(self, gathered: Gathered) -> tuple[Any, Saved[Any]]:
        backend, state, statistics = self.backend, self.state, self.statistics
        backend.statistics(*backend.root(gathered.nodes), self.eps, statistics)
        relu_mask = backend.normalize(self.inputs.extents, self.operands, statistics, statistics.affine, self.options)
        y = self.output.finish()
        if self.updates:
            with state._turn("forward_train"), state._moving("forward_train", self.inputs.held) as move:
                backend.update(statistics, move.old, move.new, move.counters, self.how)
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
    raise ValueError(message("forward_train", "x", rule, got, remedy, **facts))
