"""The training forward: at once, or in two halves around an exchange with other ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

from cubn import _arguments
from cubn._arguments import flag
from cubn._given import Parameters, gate_kind, given_with_state, kept_parameters, new_parameters, overwrites
from cubn.backends import Gate, Nodes, Running, Statistics
from cubn.errors import message
from cubn.saved import Forward, Saved, as_read
from cubn.state import BatchNormState, Held
from cubn.sync import collective
from cubn.sync.collective import Gathered, Started, SyncContext, Terms, check_sizes
from cubn.typing import AnyArray, ArrayT, Comm, Like, Sizes


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


class _Training:
    """A forward_train whose arguments were checked and whose output is ready; nothing is changed yet."""

    def __init__(
        self, x: Any, state: BatchNormState, mask: Any, residual: Any, relu: bool, update: bool, out: Any
    ) -> None:
        relu = flag(relu, "forward_train", "relu")
        update = flag(update, "forward_train", "update")
        self.given = given = given_with_state("forward_train", x, state, mask, residual)
        self.state = state
        self.eps, self.momentum = state.eps, state.momentum  # which may have changed before `finish`
        self.biased = state.running_variance == "biased"
        self.updates = update and state._counters is not None
        if self.updates:
            state._check_updatable("forward_train", given.held)
        self.output = given.destination("forward_train", out)
        self.overwrites = overwrites(out, self.output, given.source)
        self.kind = gate_kind(relu, given)
        self.backend = given.source.backend
        self.arrays = given.arrays(self.output)
        self.then = {"relu": relu, "keep_bits": self.kind == "bits"}
        self.values = _arguments.values_per_channel(given.source, given.mask)

    def check_count(self) -> None:
        """Raise unless this batch is enough by itself."""
        if self.values is None or self.values > 1:
            return
        array, mask = self.given.source.array, self.given.mask
        got = f"{self.values} where the mask is True" if mask else self.values
        _check_count(self.values, got, "", shape=array.shape, dtype=array.dtype, device=array.device)

    def run(self) -> tuple[Any, Saved[Any]]:
        """The whole step at once. y is its library's before the state is changed for good: an adoption may fail."""
        source, held = self.given.source, self.given.held
        kept = new_parameters(self.given)
        with self.turn(), self.moving(held) as running:
            after = running if running and running.in_place and self.output.array.library.adopts else None
            statistics, bits = self.backend.train(
                source.extents,
                self.arrays,
                self.eps,
                held.affine,
                **self.then,
                kept=kept.affine,
                running=None if after else running,
            )
            y = self.output.finish()
            if after:
                self.backend.update(statistics, after)
        return y, self.saved(statistics, bits, kept)

    def turn(self) -> AbstractContextManager[Any]:
        """What keeps other threads from the running statistics, if they are to move."""
        return self.state._turn("forward_train") if self.updates else nullcontext()

    def moving(self, held: Held | None = None) -> AbstractContextManager[Running | None]:
        """The running statistics (those held a moment ago), if they are to move."""
        return self.state._moving("forward_train", held) if self.updates else nullcontext()

    def saved(
        self, statistics: Statistics, bits: Any, parameters: Parameters, place: SyncContext | None = None
    ) -> Saved[Any]:
        source, _, mask, residual = self.given
        return Saved._of(
            Forward(
                source,
                mask,
                residual is not None,
                statistics,
                parameters,
                Gate(self.kind, bits),
                as_read(source, mask),
                frozen=None,
                overwritten=self.overwrites,
                place=place,
            )
        )


class _Begun(_Training):
    """A forward_train over several ranks; gamma and beta are those it began with."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.parameters = kept_parameters(self.given)

    @cached_property
    def terms(self) -> Terms:
        array, _, (N, C, _), _, _ = self.given.source
        on = {"update": self.updates, "relu": self.then["relu"], "residual": self.given.residual is not None}
        on["biased"] = self.updates and self.biased
        return Terms(
            "forward_train",
            C,
            N,
            array.dtype,
            self.eps,
            self.momentum,
            values=2 if self.values is None else self.values,
            options=frozenset(name for name in on if on[name]),
        )

    def part(self, start: int) -> Nodes:
        return self.backend.moments(self.given.source.extents, self.arrays, start)

    def accept(self, values: int) -> None:
        _check_count(values, values, " over all ranks")

    def finish(self, gathered: Gathered) -> tuple[Any, Saved[Any]]:
        statistics = self.backend.statistics(*self.backend.root(gathered.nodes), self.eps)
        extents, affine = self.given.source.extents, self.parameters.affine
        bits = self.backend.normalize(extents, self.arrays, statistics, affine, **self.then)
        y = self.output.finish()
        with self.turn(), self.moving(self.given.held) as running:
            if running:
                self.backend.update(statistics, running._replace(momentum=self.momentum, biased=self.biased))
        return y, self.saved(statistics, bits, self.parameters, gathered.context)


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
