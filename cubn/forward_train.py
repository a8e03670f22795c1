"""The training forward: at once, or in two halves around an exchange with other ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from cubn import _calls
from cubn._arrays.library import ALIGNMENT
from cubn._calls import Call, new_tuple
from cubn._ghost import GhostTraining, SynchronisedGhostTraining
from cubn._renorm import RenormalisedTraining
from cubn._state.arrays import StateArrays
from cubn._state.counted import Counted
from cubn._training import TRAININGS, Facts, SynchronisedTraining, Training
from cubn.backends.protocol import PreparedTrain
from cubn.errors import message, quoted, reporting_as
from cubn.saved import Forward, Read, Saved, keep
from cubn.state import BatchNormState
from cubn.sync import collective
from cubn.sync.collective import Started, check_sizes
from cubn.typing import AnyArray, ArrayT, Comm, Like, OnSingle, Renorm, Sizes

TrainingT = TypeVar("TrainingT", bound=Training)


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
    groups: int | None = None,
    on_single: OnSingle = "raise",
    renorm: Renorm | None = None,
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
    groups : int, optional
        Samples of a *ghost batch*: so many neighbouring ones are normalised by statistics of their own. There are
        N // groups of them, one at least; the last takes the rest. See Notes.
    on_single : {"raise", "running"}
        What becomes of a batch, the last of a data set say, that has one value per channel. "running": y and its
        backward are those of `forward_frozen`, and the running statistics stay as they are, counted as skipped.
    renorm : (r_max, d_max), optional
        Batch renormalisation: y = ((x - mean) / sqrt(var + eps) * r + d) * gamma + beta, with the state's running
        statistics from before this step in r = sqrt(var + eps) / sqrt(running_var + eps), kept from 1 / r_max to r_max,
        and d = (mean - running_mean) / sqrt(running_var + eps), kept from -d_max to d_max. Within the limits that is
        what `forward` gives. To the backward r and d are constants; they are in `saved.r` and `saved.d`. r_max is 1 or
        more and d_max 0 or more, either may be `math.inf`; (1, 0) is plain batch normalisation. Where running
        statistics are not finite, or running_var + eps is not positive, r is 1 and d is 0.
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
        is changed then. With `comm` it is the values of all ranks that count, and all of them raise. Each group needs
        two values, too.
    CollectiveMismatch
        With `comm`, on all ranks: if they do not do the same thing, or another one failed. Nothing is changed then.

    Notes
    -----
    The same bits for every layout, number of threads and array library. A channel whose statistics are not finite
    leaves its running statistics as they were, and is counted in `state.skipped`; its y is what IEEE arithmetic gives.
    Running statistics that were not finite take the values of the first batch that is, as in `update`.
    Reads x (and residual) twice from memory at most, and writes y once. With `renorm` in several launches, on a CUDA
    device too, none of which waits for it; ranks agree on renorm, and have the same r and d.

    With `groups`, y and the gradients by x and residual are to the bit those of a call for each group; dgamma and dbeta
    are sums over the groups, in float64 and rounded once. The running statistics are updated once, by `moments(x)` of
    the whole batch; where they are, x is read once more. With `comm` groups are of *global* samples, so that they may
    have samples on several ranks, and all nodes travel in one exchange. Behind a mask on a CUDA device a group of one
    value, or none, is not refused: its y is what IEEE arithmetic gives, and it adds nothing to dgamma and dbeta if it
    has none.

    With `on_single="running"` it is the values of the whole batch that count, of all ranks, and not those of a group.
    How many a mask on a CUDA device lets through is not known.

    With `comm`, statistics, running statistics and y are to the bit what one process computes from the ranks' samples
    put together. Two collectives: a header of 64 bytes from each rank, under way while it takes its statistics; then
    16 C + 8 bytes for each aligned power-of-two block of its samples, one block where N is the same power of two
    everywhere. Waits for the other ranks.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch normalization", https://arxiv.org/abs/1502.03167
    Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances"
    Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", https://arxiv.org/abs/1705.08741 (ghost batches)
    Summers & Dinneen 2020, "Four things everyone should know to improve batch normalization",
    https://arxiv.org/abs/1906.03548
    Ioffe 2017, "Batch renormalization", https://arxiv.org/abs/1702.03275

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.random.default_rng(0).standard_normal((10, 3), dtype=np.float32)
    >>> y, saved = cubn.forward_train(x, cubn.BatchNormState(3), groups=4)
    >>> saved.count
    array([4, 6])
    >>> bool((y[:4] == cubn.forward_train(x[:4], cubn.BatchNormState(3))[0]).all())
    True

    The limits are the caller's, and may be others at every step: Ioffe begins with plain batch normalisation.

    >>> import numpy as np, cubn
    >>> state = cubn.BatchNormState(2)
    >>> rng = np.random.default_rng(0)
    >>> for step in range(40):
    ...     warm = min(max(step - 10, 0) / 20, 1.0)  # 0 for ten steps, 1 from the thirtieth on
    ...     x = rng.normal([5, -1], [2, 3], (4, 2)).astype(np.float32)
    ...     y, saved = cubn.forward_train(x, state, renorm=(1 + 2 * warm, 5 * warm))
    >>> bool((saved.r <= 3).all() and (abs(saved.d) <= 5).all())
    True
    """
    alone = comm is None and sizes is None and groups is None and renorm is None and type(on_single) is str
    if alone and (relu is False or relu is True) and (update is True or update is False):
        found = _calls.find(TRAININGS, x, state, mask, residual, out, relu, update)
        if found is not None and (on_single == "raise" or (on_single == "running" and state._counters is not None)):
            done = _again(*found, x, state, mask, residual, out)
            if done is not None:
                return done
    with reporting_as("forward_train"):
        check_sizes(sizes, comm)
        if comm is not None:
            return _start(comm, sizes, groups, renorm, x, state, mask, residual, relu, update, out, on_single).finish()
        arguments = x, state, mask, residual, relu, update, out, on_single
        training = _training(Training, GhostTraining, groups, renorm, *arguments)
        if training.is_single:
            return training.by_running()
        training.check_count()
        return training.run()


@reporting_as("forward_train")
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
    groups: int | None = None,
    on_single: OnSingle = "raise",
    renorm: Renorm | None = None,
    out: ArrayT | None = None,
) -> Started[tuple[ArrayT, Saved[ArrayT]]]:
    """Begin a `forward_train` over the ranks of a communicator, and leave time for other work until its `finish`.

    Takes this rank's statistics and begins to send them; nothing is changed before `finish`.

    Parameters
    ----------
    x, state, comm, sizes, mask, residual, relu, update, groups, on_single, renorm, out
        As in `forward_train`; renorm and on_single take the running statistics as they are in `finish`.

    Returns
    -------
    Started
        Its `finish()` returns what `forward_train` returns.

    Raises
    ------
    TypeError, ValueError, CollectiveMismatch, numpy.exceptions.AxisError, BackendUnavailable, ImportError
        As in `forward_train`; here or in `finish`, but on all ranks in the same place.
    """
    return _start(comm, sizes, groups, renorm, x, state, mask, residual, relu, update, out, on_single)


def _start(comm: Comm, sizes: Sizes | None, *arguments: Any) -> Started[tuple[Any, Saved[Any]]]:
    make = partial(_training, SynchronisedTraining, SynchronisedGhostTraining)
    return collective.start(comm, sizes, partial(make, *arguments))


def _training(
    plain: type[TrainingT], ghost: Callable[..., TrainingT], groups: Any, renorm: Any, *arguments: Any
) -> TrainingT | RenormalisedTraining:
    """The kind of training forward that is asked for."""
    if renorm is None:
        return plain(*arguments) if groups is None else ghost(groups, *arguments)
    if groups is not None:
        rule, remedy = "be None beside groups", "Ghost batches are not renormalised: use one of the two."
        raise ValueError(message("renorm", rule, quoted(renorm), remedy))
    return RenormalisedTraining(renorm, *arguments)


def _again(
    call: Call[PreparedTrain, Facts],
    held: StateArrays,
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
            counters: Counted = state._counters  # type: ignore[assignment]  # beside running statistics
            _, eps, momentum, _, _ = state._options
            if state._held is not held or counters.device is not layouts.backend.device:
                return None
            if (counting := counters.at) is None:
                return None
            if momentum is not None and not 0 <= momentum <= 1:
                return None
            statistics, relu_mask = call.prepared(
                at_x, at_residual, at_y, at_mask, gamma, beta, eps, mean, var, mean, var, *counting, momentum
            )
            if held.versioned:
                held.mark_written()
    else:
        statistics, relu_mask = call.prepared(at_x, at_residual, at_y, at_mask, gamma, beta, state._options.eps)
    counts = library.counts_versions
    if out is not None and counts:
        library.mark_written(out)
    read = new_tuple(Read, (x, at_x, library.version(x) if counts else None, None))
    masked = None
    if mask is not None:
        masked = new_tuple(Read, (mask, at_mask, library.version(mask) if counts else None, None))
    saved = object.__new__(Saved)
    forward = layouts, read, masked, held, statistics, relu_mask, False, at_y == at_x, None, None
    keep(saved, new_tuple(Forward, forward))
    return y, saved
