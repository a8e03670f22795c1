"""The forward operations: inference, training, frozen statistics, and normalisation by given moments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

from cubn import _arguments, _arrays
from cubn._arguments import Companion, Source, region
from cubn._arrays import Array, Output
from cubn._layout import operand
from cubn.backends import Affine, Arrays, BackendArray, Gate, Nodes, Running, Statistics, Vector
from cubn.errors import message
from cubn.moments import Moments, statistics_of
from cubn.state import BatchNormState, Held, checked_eps, checked_state, hold
from cubn.sync import collective, communicator
from cubn.sync.collective import Place, Shared, Started, Terms, check_sizes


class Given(NamedTuple):
    """What an operation was given, checked."""

    source: Source
    held: Held
    mask: Companion | None
    residual: Companion | None

    def arrays(self, y: Output) -> Arrays:
        """As kernels see them, and where y goes."""
        source, _, mask, residual = self
        written = operand(y.array, source.axis)
        return Arrays(source.operand, residual and residual.operand, written, None, mask and mask.operand)


class Kept(NamedTuple):
    """A parameter as it was in the forward, and where it came from."""

    vector: Vector
    values: BackendArray
    home: Array


class Parameters(NamedTuple):
    """gamma and beta, where there are any, as they were in the forward."""

    gamma: Kept | None
    beta: Kept | None

    @property
    def affine(self) -> Affine:
        return Affine(self.gamma and self.gamma.vector, self.beta and self.beta.vector)


class Saved:
    """What `backward` needs from the forward that returned it.

    Holds a reference to x (and to the mask), and copies of everything else, so that later updates of the state do not
    change a backward. May be used several times. x (and the mask) must stay as they are until the last of them: a
    PyTorch tensor that was changed in place is noticed, a change of another library's array is not.

    Attributes
    ----------
    x : array
        As given.
    count : int64 array of shape ()
        Values per channel; 0 where the statistics were frozen.
    mean, var, invstd : float64 arrays of shape (C,)
        The statistics x was normalised by; invstd = 1 / sqrt(var + eps).
    relu_bits : object or None
        After a residual and a ReLU: which elements of y are positive or NaN, at one bit an element, packed as suits the
        backend. Without a residual they are recomputed from x, and nothing of the input's size is kept.
    """

    __slots__ = (
        "frozen",
        "gate",
        "has_residual",
        "mask",
        "overwritten",
        "parameters",
        "place",
        "source",
        "statistics",
        "unchanged",
    )

    def __reduce_ex__(self, protocol: Any) -> Any:
        remedy = "It has addresses of x's memory: keep x and the state, and call the forward again."
        raise TypeError(message("Saved", "saved", "stay in this process and is not copied", "copy or pickle", remedy))

    def __init__(
        self,
        given: Given,
        statistics: Statistics,
        parameters: Parameters,
        gate: Gate,
        *,
        frozen: bool,
        overwritten: bool,
        place: Place | None = None,
    ) -> None:
        self.source = given.source
        self.mask = given.mask
        self.has_residual = given.residual is not None
        self.statistics = statistics
        self.parameters = parameters
        self.gate = gate
        self.frozen = frozen
        self.overwritten = overwritten
        self.place = place
        read = {"x": given.source.array} | ({"mask": given.mask.array} if given.mask else {})
        self.unchanged = [(name, array, array.library.version(array)) for name, array in read.items()]

    @property
    def x(self) -> Any:
        return self.source.array.owner

    @property
    def count(self) -> Any:
        return self.statistics.count

    @property
    def mean(self) -> Any:
        return self.statistics.mean

    @property
    def var(self) -> Any:
        return self.statistics.var

    @property
    def invstd(self) -> Any:
        return self.statistics.invstd

    @property
    def relu_bits(self) -> Any:
        return self.gate.bits


def forward(
    x: Any, state: BatchNormState, *, mask: Any = None, residual: Any = None, relu: bool = False, out: Any = None
) -> Any:
    """Normalise by running statistics: inference.

    y = (x - running_mean) / sqrt(running_var + eps) * gamma + beta, then + residual, then ReLU.

    Parameters
    ----------
    x : array of any library, rank 2 or more, C channels on the state's channel_axis
        float16, bfloat16, float32 or float64.
    state : BatchNormState
        With running statistics; on x's device.
    mask : bool array on x's device, optional
        True where a position is present; y is 0 elsewhere. x's shape without the channel axis (or with 1 there), each
        extent full or 1.
    residual : array like x, optional
        Added before the ReLU. Of x's shape, dtype, library and device; any layout.
    relu : bool
        Whether what is below 0 becomes 0. A NaN stays.
    out : array like x, optional
        Where y goes: exactly x, exactly residual, or memory of its own.

    Returns
    -------
    array
        y, or `out`: of x's shape, dtype, library and device; of x's layout where that is dense, else C-contiguous.

    Raises
    ------
    TypeError
        If an array is not one, has another dtype or library, requires a gradient, or cannot be written (`out`).
    ValueError
        If shapes or devices do not fit, `out` overlaps another array, or the state has no running statistics.
    numpy.exceptions.AxisError
        If x has no such channel_axis.
    BackendUnavailable, ImportError
        If nothing computes on x's device; the message says what to do.

    Notes
    -----
    A sample's y does not depend on the other samples, nor on layout, alignment, threads or array library: the same
    bits, always. Arithmetic is in float32 (float64 for float64 x), rounded once. Reads x
    (and residual) once, writes y once.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch normalization", https://arxiv.org/abs/1502.03167
    """
    given = _given("forward", x, state, mask, residual)
    source, held = given.source, given.held
    running = _running(held, "forward")
    output = _destination("forward", out, given)
    source.backend.forward(source.extents, given.arrays(output), running, state.eps, held.affine, relu=bool(relu))
    return output.finish()


def forward_train(
    x: Any,
    state: BatchNormState,
    *,
    mask: Any = None,
    residual: Any = None,
    relu: bool = False,
    comm: Any = None,
    sizes: Any = None,
    update: bool = True,
    out: Any = None,
) -> tuple[Any, Saved]:
    """Normalise by the batch's own statistics, and move the running statistics towards them: training.

    y = (x - mean) / sqrt(var + eps) * gamma + beta, then + residual, then ReLU, with mean and var = m2 / count over all
    present values of a channel; running = (1 - momentum) * running + momentum * batch, its variance m2 / (count - 1).

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
        options = {"mask": mask, "residual": residual, "relu": relu, "update": update, "out": out}
        return forward_train_start(x, state, comm=comm, sizes=sizes, **options).finish()
    training = _Training(x, state, mask, residual, relu, update, out)
    training.check_count()
    return training.run()


def forward_train_start(
    x: Any,
    state: BatchNormState,
    *,
    comm: Any,
    sizes: Any = None,
    mask: Any = None,
    residual: Any = None,
    relu: bool = False,
    update: bool = True,
    out: Any = None,
) -> Started[tuple[Any, Saved]]:
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
    make = partial(_Begun, x, state, mask, residual, relu, update, out)
    return collective.start("forward_train", comm, sizes, make)


class _Training:
    """A forward_train whose arguments were checked and whose output is ready; nothing is changed yet."""

    def __init__(
        self, x: Any, state: BatchNormState, mask: Any, residual: Any, relu: bool, update: bool, out: Any
    ) -> None:
        self.given = given = _given("forward_train", x, state, mask, residual)
        self.state = state
        self.eps, self.momentum = state.eps, state.momentum  # which may have changed before `finish`
        self.biased = state.running_variance == "biased"
        self.updates = update and state._counters is not None
        if self.updates:
            state._check_updatable("forward_train", given.held)
        self.output = _destination("forward_train", out, given)
        self.overwrites = _overwrites(out, self.output, given.source)
        self.kind = _gate_kind(relu, given)
        self.backend = given.source.backend
        self.arrays = given.arrays(self.output)
        self.then = {"relu": bool(relu), "keep_bits": self.kind == "bits"}
        self.values = _arguments.values_per_channel(given.source, given.mask)

    def check_count(self) -> None:
        """Raise unless this batch is enough by itself."""
        if self.values is None or self.values > 1:
            return
        array, mask = self.given.source.array, self.given.mask
        got = f"{self.values} where the mask is True" if mask else self.values
        _check_count(self.values, got, "", shape=array.shape, dtype=array.dtype, device=array.device)

    def run(self) -> tuple[Any, Saved]:
        """The whole step at once."""
        source, held = self.given.source, self.given.held
        kept = _new_parameters(self.given)
        with self.turn(), self.moving(held) as running:
            statistics, bits = self.backend.train(
                source.extents, self.arrays, self.eps, held.affine, **self.then, kept=kept.affine, running=running
            )
        return self.trained(statistics, bits, kept)

    def turn(self) -> AbstractContextManager[Any]:
        """What keeps other threads from the running statistics, if they are to move."""
        return self.state._turn("forward_train") if self.updates else nullcontext()

    def moving(self, held: Held | None = None) -> AbstractContextManager[Running | None]:
        """The running statistics (those held a moment ago), if they are to move."""
        return self.state._moving("forward_train", held) if self.updates else nullcontext()

    def trained(
        self, statistics: Statistics, bits: Any, parameters: Parameters, place: Place | None = None
    ) -> tuple[Any, Saved]:
        """y and Saved."""
        y = self.output.finish()
        gate = Gate(self.kind, bits)
        return y, Saved(
            self.given, statistics, parameters, gate, frozen=False, overwritten=self.overwrites, place=place
        )


class _Begun(_Training):
    """A forward_train over several ranks; gamma and beta are those it began with."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.parameters = _kept_parameters(self.given)

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

    def finish(self, shared: Shared) -> tuple[Any, Saved]:
        statistics = self.backend.statistics(*self.backend.root(shared.nodes), self.eps)
        extents, affine = self.given.source.extents, self.parameters.affine
        bits = self.backend.normalize(extents, self.arrays, statistics, affine, **self.then)
        with self.turn(), self.moving(self.given.held) as running:
            if running:
                self.backend.update(statistics, running._replace(momentum=self.momentum, biased=self.biased))
        return self.trained(statistics, bits, self.parameters, shared.place)


def forward_frozen(
    x: Any,
    state: BatchNormState,
    *,
    mask: Any = None,
    residual: Any = None,
    relu: bool = False,
    comm: Any = None,
    sizes: Any = None,
    out: Any = None,
) -> tuple[Any, Saved]:
    """Normalise by running statistics, with a backward: fine-tuning on statistics that stay as they are.

    y = (x - running_mean) / sqrt(running_var + eps) * gamma + beta, then + residual, then ReLU; the same bits as
    `forward`. In the backward, dx = dy * gamma / sqrt(running_var + eps).

    Parameters
    ----------
    x, state, mask, residual, relu
        As in `forward`. The state is not changed.
    comm, sizes
        As in `forward_train`; nothing is exchanged here, but in the backward.
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
    TypeError, ValueError, numpy.exceptions.AxisError, BackendUnavailable, ImportError
        As in `forward`.

    Notes
    -----
    The same bits for every layout, number of threads and array library. Reads x (and residual) once, writes y once.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch normalization", https://arxiv.org/abs/1502.03167
    """
    check_sizes("forward_frozen", sizes, comm)
    place = None if comm is None else Place(communicator(comm), sizes, 0)
    given = _given("forward_frozen", x, state, mask, residual)
    source = given.source
    running = _running(given.held, "forward_frozen")
    output = _destination("forward_frozen", out, given)
    parameters = _kept_parameters(given)
    kind = _gate_kind(relu, given)
    statistics = source.backend.frozen_statistics(running, source.extents.C, state.eps)
    then = {"relu": bool(relu), "keep_bits": kind == "bits"}
    bits = source.backend.normalize(source.extents, given.arrays(output), statistics, parameters.affine, **then)
    y = output.finish()
    return y, Saved(
        given,
        statistics,
        parameters,
        Gate(kind, bits),
        frozen=True,
        overwritten=_overwrites(out, output, source),
        place=place,
    )


def normalize(
    x: Any,
    moments: Moments,
    *,
    gamma: Any = None,
    beta: Any = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    mask: Any = None,
    residual: Any = None,
    relu: bool = False,
    out: Any = None,
) -> Any:
    """Normalise by given moments: of this batch, of several batches, of a data set.

    y = (x - mean) / sqrt(var + eps) * gamma + beta, then + residual, then ReLU, with var = m2 / count. With
    `moments(x)`, the same bits as `forward_train`.

    Parameters
    ----------
    x, mask, residual, relu, out
        As in `forward`.
    moments : Moments
        Of C channels and at least one value.
    gamma, beta : array of shape (C,), any library, x's device, optional
        float16, bfloat16, float32 or float64. Without them 1 and 0.
    eps : float
        Added to the variance; positive.
    channel_axis : int
        The channels' axis in x; may be negative.

    Returns
    -------
    array
        As from `forward`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, BackendUnavailable, ImportError
        As in `forward`, and if eps or moments do not fit.

    Notes
    -----
    A sample's y does not depend on the other samples. Reads x (and residual) once, writes y once.
    """
    if not isinstance(moments, Moments):
        remedy = "Use cubn.moments(x) to take them."
        raise TypeError(message("normalize", "moments", "be Moments", type(moments).__name__, remedy))
    source = _arguments.source("normalize", x, channel_axis, moments.num_features)
    if not moments.count:
        raise ValueError(message("normalize", "moments", "be of one value per channel or more", moments.count))
    eps = checked_eps(eps, "normalize")
    parameters = {
        name: _arguments.parameter("normalize", name, parameter, source)
        for name, parameter in (("gamma", gamma), ("beta", beta))
        if parameter is not None
    }
    held = hold(parameters, "normalize")
    given = _beside("normalize", source, held, mask, residual)
    output = _destination("normalize", out, given)
    statistics = statistics_of(moments, eps, source.backend)
    source.backend.normalize(
        source.extents, given.arrays(output), statistics, held.affine, relu=bool(relu), keep_bits=False
    )
    return output.finish()


def _given(function: str, x: Any, state: BatchNormState, mask: Any, residual: Any) -> Given:
    """x, the state's arrays, mask and residual."""
    checked_state(state, function)
    source = _arguments.source(function, x, state.channel_axis, state.num_features)
    return _beside(function, source, state._read(function, source.array), mask, residual)


def _beside(function: str, source: Source, held: Held, mask: Any, residual: Any) -> Given:
    return Given(
        source,
        held,
        None if mask is None else _arguments.mask(function, mask, source),
        None if residual is None else _arguments.beside(function, "residual", residual, source),
    )


def _running(held: Held, function: str) -> tuple[Vector, Vector]:
    if held.running is None:
        remedy = "Use forward_train, or normalize by moments(x)."
        raise ValueError(message(function, "state", "have running statistics", "a state with track=False", remedy))
    return held.running


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
        remedy = "Skip the empty batch."
    raise ValueError(message("forward_train", "x", rule, got, remedy, **facts))


def _destination(function: str, out: Any, given: Given) -> Output:
    """Where y goes: a new array, or `out`."""
    source, held, mask, residual = given
    if out is None:
        return _arrays.empty_like(source.array)
    in_place = {"x": source.array, "residual": residual and residual.array}
    masked = (region("mask", mask.array),) if mask else ()
    return _arguments.destination(function, out, source, in_place, (*masked, *held.regions))


def _overwrites(out: Any, y: Output, x: Source) -> bool:
    """Whether y was written over x."""
    return out is not None and _arrays.overlap(y.array, x.array) != "none"


def _gate_kind(relu: bool, given: Given) -> str:
    """How the backward will know what a ReLU stopped; see `Gate`."""
    if not relu:
        return "none"
    return "recompute" if given.residual is None else "bits"


def _new_parameters(given: Given) -> Parameters:
    """Room for gamma and beta as they are now, still to be written."""
    source, held, _, _ = given

    def new(name: str, parameter: Vector | None) -> Kept | None:
        if parameter is None:
            return None
        values, vector = source.backend.new_vector(source.extents.C)
        return Kept(vector, values, held.arrays[name])

    return Parameters(new("gamma", held.affine.gamma), new("beta", held.affine.beta))


def _kept_parameters(given: Given) -> Parameters:
    """gamma and beta as they are now."""
    source, held, _, _ = given
    parameters = _new_parameters(given)
    if any(parameters):
        source.backend.keep(held.affine, parameters.affine, source.extents.C)
    return parameters
