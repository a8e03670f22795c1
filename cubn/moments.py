"""Moments of a range of samples: taken, and turned into running statistics."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from cubn import _arguments, _arrays, _calls, _nodes
from cubn._arguments import on_host
from cubn._entries import MOST
from cubn._floating_point import default_floating_point
from cubn._inputs import bind_mask_and_residual, bind_x
from cubn._moments import Moments
from cubn._types import BOOL, NUMBERS, Nodes
from cubn.backends.protocol import Backend, PreparedMoments, PreparedUpdate
from cubn.errors import message, reporting_as
from cubn.state import BatchNormState, checked_state
from cubn.sync import collective
from cubn.sync.collective import Gathered, Terms, check_sizes
from cubn.typing import AnyArray, ArrayT, Comm, DType, Sizes


def moments(
    x: AnyArray,
    *,
    channel_axis: int = 1,
    mask: AnyArray | None = None,
    comm: Comm | None = None,
    sizes: Sizes | None = None,
    start: int = 0,
    dtype: DType | None = None,
) -> Moments:
    """Count, mean and sum of squared deviations of each channel of x.

    mean = sum(x) / count and m2 = sum((x - mean)**2) over every axis but the channel's, present positions only.

    Parameters
    ----------
    x : array of any library, rank 2 or more; float16, bfloat16, float32 or float64
        Samples are its first axis that is not the channel's. Zero samples or positions give moments of nothing.
    channel_axis : int
        The channels' axis; may be negative.
    mask : bool array on x's device, optional
        True where a position is present. x's shape without the channel axis (or with 1 there), each extent full or 1.
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or cubn.sync.Communicator, optional
        The ranks that hold the batch in parts, in rank order; all of them call this.
    sizes : sequence of int, optional
        With `comm`, the samples of each rank, if known; see `forward_train`.
    start : int
        Global index of the first sample, where x is a part of a larger batch or data set; with `comm`, that of the
        first rank's first sample.
    dtype : {"float32", "float64"}, optional
        What x is converted to first, so that x may hold integers or bools, or narrower floats; exactly, or refused. A
        copy is made, of an array on a CUDA device in host memory.

    Returns
    -------
    Moments
        Of samples [start, start + N); with `comm`, of the samples of all ranks, on each of them.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message says what is asked for.
    numpy.exceptions.AxisError
        If x has no such channel_axis.
    CollectiveMismatch
        With `comm`, on all ranks: if they do not do the same thing, or another one failed.

    Notes
    -----
    The same bits for every layout, number of threads and array library; cut into ranges and merged, too. Reads x once.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    >>> cubn.moments(pixels, dtype="float64").mean
    array([ 7.5, 11.5, 15.5])
    """
    if comm is None and sizes is None and dtype is None and type(channel_axis) is type(start) is int and start >= 0:
        found = _calls.look_up(_MOMENTS, (x, mask), channel_axis, start)
        if found is not None:
            taken, at = found
            return Moments._of(start, start + taken.N, _on_host(taken.prepared(*at), taken.backend))
    return _moments(x, channel_axis, mask, comm, sizes, start, dtype)


@reporting_as("moments")
def _moments(
    x: Any, channel_axis: int, mask: Any, comm: Comm | None, sizes: Sizes | None, start: int, dtype: DType | None
) -> Moments:
    """With every check."""
    check_sizes(sizes, comm)
    if comm is not None:
        make = partial(_Taking, x, channel_axis, mask, start, dtype)
        return collective.start(comm, sizes, make).finish()
    taking = _Taking(x, channel_axis, mask, start, dtype)
    first, inputs, operands = taking.terms.start, taking.inputs, taking.inputs.operands()
    taken = _Taken(inputs.backend.prepare_moments(inputs.extents, operands, first), inputs.extents.N, inputs.backend)
    if dtype is None and type(channel_axis) is type(start) is int:
        _calls.add(_MOMENTS, taken, (inputs.x, inputs.mask), channel_axis, start)
    nodes = taken.prepared(operands.x.pointer, operands.mask.pointer if operands.mask else 0)
    return Moments._of(first, first + taken.N, _on_host(nodes, taken.backend))


_MOMENTS = _calls.new_store()


class _Taken(NamedTuple):
    """Moments that were taken before, but for where."""

    prepared: PreparedMoments
    N: int
    backend: Backend

    @property
    def nbytes(self) -> int:
        return int(getattr(self.prepared, "nbytes", 0))


class _Taking:
    """A `moments` whose arguments were checked."""

    def __init__(self, x: Any, channel_axis: int, mask: Any, start: int, dtype: DType | None) -> None:
        if dtype is not None:
            described = None if mask is None else _arrays.describe(mask, "mask", BOOL)
            x, mask = _converted(x, dtype), described and on_host(described)
        self.inputs = inputs = bind_mask_and_residual(bind_x(x, channel_axis), mask)
        first = _arguments.as_int(start, "start")
        if not 0 <= first < MOST:
            rule = "be 0 or more and less than 2**62, a global sample index"
            raise ValueError(message("start", rule, first))
        self.backend = inputs.backend
        N, C, _ = inputs.extents
        self.terms = Terms("moments", C, N, inputs.x.dtype, start=first)

    def part(self, start: int, total: int) -> Nodes:
        return self.backend.moments(self.inputs.extents, self.inputs.operands(), start)

    def accept(self, values: int) -> None:
        """Any number of values has moments."""

    def finish(self, gathered: Gathered) -> Moments:
        blocks = gathered.nodes.blocks
        start, stop = (blocks[0][0], blocks[-1][1]) if blocks else (self.terms.start,) * 2
        return Moments._of(start, stop, _nodes.merge(_on_host(gathered.nodes, self.backend)))


def _on_host(nodes: Nodes, place: Backend) -> Nodes:
    """Nodes in memory that Moments can take them from."""
    return nodes if place.device is None else nodes._replace(table=place.to_host(nodes.table))


_INTEGERS = {"float32": 1 << 24, "float64": 1 << 53}
"""Up to which a dtype holds every integer."""


@default_floating_point
def _converted(x: Any, dtype: DType) -> np.ndarray[Any, Any]:
    """x in another dtype, without loss."""
    name = _arguments.dtype_name(dtype, tuple(_INTEGERS))
    values = on_host(_arrays.describe(x, "x", NUMBERS))
    exact = values.dtype.itemsize <= np.dtype(name).itemsize
    if values.dtype.kind in "iu" and values.size:
        exact = -_INTEGERS[name] <= int(values.min()) and int(values.max()) <= _INTEGERS[name]
    if not exact:
        remedy = "Convert it first, if rounding is meant." if name == "float64" else "Use dtype='float64'."
        rule = f"hold numbers that {name} can hold exactly"
        raise ValueError(message("x", rule, f"values of {values.dtype}", remedy, shape=values.shape))
    return values.astype(name)


@overload
def finite_mask(x: NDArray[Any], *, channel_axis: int = 1) -> NDArray[np.bool_]: ...


@overload
def finite_mask(x: ArrayT, *, channel_axis: int = 1) -> ArrayT: ...


@reporting_as("finite_mask")
def finite_mask(x: Any, *, channel_axis: int = 1) -> Any:
    """Which positions of x are finite in all channels: the mask with which NaN and inf are left out.

    Parameters
    ----------
    x : array of any library, rank 2 or more; float16, bfloat16, float32 or float64
    channel_axis : int
        The channels' axis; may be negative.

    Returns
    -------
    array of bool
        Of x's library, on its device (of a library cubn does not know: NumPy's); x's shape without the channel axis, as
        `mask=` takes it. A mask has no channel axis: where one channel is NaN, the position is left out of the others
        too.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If x is no such array, or has no such channel_axis.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.array([[1.0, 2.0], [np.nan, 3.0], [5.0, 4.0]])
    >>> cubn.finite_mask(x)
    array([ True, False,  True])
    >>> cubn.moments(x, mask=cubn.finite_mask(x)).mean
    array([3., 3.])
    """
    inputs = bind_x(x, channel_axis)
    return inputs.x.library.finite(inputs.x, inputs.axis)


def update(state: BatchNormState, moments: Moments) -> None:
    """Move a state's running statistics towards given moments.

    running = (1 - momentum) * running + momentum * value, for mean and variance: m2 / (count - 1), or m2 / count where
    the state's `running_variance` is "biased". With `momentum=None`, the cumulative average. A channel whose moments or
    new values are not finite, or that has fewer than two values, stays as it was and is counted in `state.skipped`. One
    whose old mean or variance is not finite takes both new values, and its cumulative average begins anew; at a
    momentum of 1 every channel takes them. A momentum of 0 changes nothing but the counters.

    Parameters
    ----------
    state : BatchNormState
        Updated in place; arrays of an immutable library are replaced by new ones.
    moments : Moments
        Of a batch, a micro-batch, several batches merged or added, or from statistics.

    Raises
    ------
    TypeError
        If moments are not Moments.
    ValueError
        If the state has no running statistics, cannot be written, or has another number of channels.

    Notes
    -----
    Computed in float64 and rounded once. Updates of one state from several threads take turns.
    """
    if type(state) is BatchNormState and type(moments) is Moments and _again(state, moments):
        return
    _update(state, moments)


@reporting_as("update")
def _update(state: BatchNormState, moments: Moments) -> None:
    """With every check."""
    checked_state(state)
    if not isinstance(moments, Moments):
        remedy = "Use cubn.moments(x) to take them."
        raise TypeError(message("moments", "be Moments", type(moments).__name__, remedy))
    if moments.num_features != state.num_features:
        rule = f"have {state.num_features} channels, as the state has"
        raise ValueError(message("moments", rule, moments.num_features))
    state._check_updatable()
    place = state._place()
    statistics = moments._place(state.eps, place)
    with state._turn(), state._moving() as move:
        place.update(statistics, move.old, move.new, move.counters, move.update)
        held = state._held
        if held is not None and move.in_place:
            prepared = place.prepare_update(moments.num_features, move.old, move.new, move.update.biased)
            key = (held.layout, moments.num_features, move.update.biased)
            _UPDATES.add(key, _Updated(prepared, place))


_UPDATES = _calls.new_store()


class _Updated(NamedTuple):
    """An update that was made before, but for where."""

    prepared: PreparedUpdate
    backend: Backend
    nbytes: int = 0


def _again(state: BatchNormState, moments: Moments) -> bool:
    """Update as it was done before; False where something is in its way."""
    held, counters, lock = state._held, state._counters, state._lock
    features, eps, momentum, _, variance = state._options
    if held is None or counters is None or features != moments.num_features or not held.describes(state._arrays):
        return False
    updated = _UPDATES.get((held.layout, features, variance == "biased"))
    if updated is None or lock._is_owned():  # type: ignore[attr-defined]
        return False
    statistics = moments._place(eps, updated.backend)
    with lock:
        counters, momentum = state._counters, state._options.momentum
        if counters is None or counters.device is not updated.backend.device or state._held is not held:
            return False
        if (counting := counters.at) is None:
            return False
        if momentum is not None and not 0 <= momentum <= 1:
            return False
        _, _, mean, var = held.addresses
        updated.prepared(statistics, mean, var, mean, var, *counting, momentum)
        held.mark_written()
    return True
