"""The forward operations on given statistics: inference, fine-tuning, and normalisation by moments."""

from __future__ import annotations

import math
from typing import Any

from cubn import _calls
from cubn._arguments import flag
from cubn._arrays.library import ALIGNMENT
from cubn._calls import Call
from cubn._inputs import bind, bind_mask_and_residual, bind_parameters, bind_x, overwrites, relu_gradient
from cubn._moments import Moments
from cubn._state.arrays import StateArrays
from cubn._state.options import checked_eps
from cubn._types import NormalizeOptions, Running
from cubn.errors import message, reporting_as
from cubn.saved import Forward, Layouts, Read, Saved
from cubn.state import BatchNormState
from cubn.sync import communicator
from cubn.sync.collective import SyncContext, check_sizes
from cubn.typing import AnyArray, ArrayT, Comm, Like, Sizes, SupportsDLPack

FORWARDS = _calls.new_store()


def forward(
    x: ArrayT,
    state: BatchNormState,
    *,
    mask: AnyArray | None = None,
    residual: Like[ArrayT] | None = None,
    relu: bool = False,
    out: ArrayT | None = None,
) -> ArrayT:
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
    if relu is False or relu is True:
        found = _calls.find(FORWARDS, x, state, mask, residual, out, relu)
        if found is not None:
            call, held, at_x, at_residual, at_mask, at_y = found
            y = out
            if y is None:
                y, at_y = call.allocate(x)
            if at_y % ALIGNMENT == call.alignment:
                call.prepared(at_x, at_residual, at_y, at_mask, *held.addresses, state._options.eps)
                if out is not None and call.library.counts_versions:
                    call.library.mark_written(out)
                return y
    return _forward(x, state, mask, residual, relu, out)  # type: ignore[no-any-return]


@reporting_as("forward")
def _forward(x: Any, state: BatchNormState, mask: Any, residual: Any, relu: bool, out: Any) -> Any:
    """With every check."""
    relu = flag(relu, "relu")
    inputs = bind(x, state, mask, residual)
    held = inputs.held
    running = _running(held)
    output = inputs.destination(out)
    options = NormalizeOptions(residual is not None, relu)
    operands = inputs.operands(output.array)
    prepared = inputs.backend.prepare_forward(inputs.extents, operands, held.affine, running, options)
    at_x, at_residual, at_y, _, at_mask = (operand.pointer if operand else 0 for operand in operands)
    prepared(at_x, at_residual, at_y, at_mask, *held.addresses, state.eps)
    call = Call(prepared, None, inputs.x, output.array, (inputs.x, inputs.residual_or_dy), (inputs.mask,))
    _calls.remember(FORWARDS, call, inputs, state, None if out is None else output.array, relu)
    return output.finish()


def forward_frozen(
    x: ArrayT,
    state: BatchNormState,
    *,
    mask: AnyArray | None = None,
    residual: Like[ArrayT] | None = None,
    relu: bool = False,
    comm: Comm | None = None,
    sizes: Sizes | None = None,
    out: ArrayT | None = None,
) -> tuple[ArrayT, Saved[ArrayT]]:
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
    if comm is None and sizes is None and (relu is False or relu is True):
        found = _calls.find(FROZEN, x, state, mask, residual, out, relu)
        if found is not None:
            call, held, at_x, at_residual, at_mask, at_y = found
            y = out
            if y is None:
                y, at_y = call.allocate(x)
            if at_y % ALIGNMENT == call.alignment:
                layouts, version = call.facts, call.library.version
                read = Read(x, at_x, version(x), None)
                masked = None if mask is None else Read(mask, at_mask, layouts.mask.library.version(mask), None)
                at = at_x, at_residual, at_y, at_mask
                statistics, relu_mask = call.prepared(*at, *held.addresses, state.eps)
                forward = Forward(layouts, read, masked, held, statistics, relu_mask, True, at_y == at_x)
                if out is not None and call.library.counts_versions:
                    call.library.mark_written(out)
                return y, Saved._of(forward)
    return _forward_frozen(x, state, mask, residual, relu, comm, sizes, out)


@reporting_as("forward_frozen")
def _forward_frozen(
    x: Any,
    state: BatchNormState,
    mask: Any,
    residual: Any,
    relu: bool,
    comm: Comm | None,
    sizes: Sizes | None,
    out: Any,
) -> tuple[Any, Saved[Any]]:
    """With every check."""
    check_sizes(sizes, comm)
    relu = flag(relu, "relu")
    group = None if comm is None else communicator(comm)
    inputs = bind(x, state, mask, residual)
    extents, held = inputs.extents, inputs.held
    context = SyncContext.without_exchange(group, sizes, extents.N) if group else None
    running = _running(held)
    output = inputs.destination(out)
    layouts = Layouts.of(inputs, relu_gradient(relu, residual is not None))
    options = NormalizeOptions(residual is not None, relu, keep_mask=layouts.relu == "mask")
    operands = inputs.operands(output.array)
    prepared = inputs.backend.prepare_frozen(extents, operands, held.affine, running, options)
    at_x, at_residual, at_y, _, at_mask = (operand.pointer if operand else 0 for operand in operands)
    statistics, relu_mask = prepared(at_x, at_residual, at_y, at_mask, *held.addresses, state.eps)
    read, masked = Read.of(inputs.x), inputs.mask and Read.of(inputs.mask)
    overwritten = overwrites(out, output, inputs.x)
    forward = Forward(layouts, read, masked, held, statistics, relu_mask, True, overwritten, context)
    call = Call(prepared, layouts, inputs.x, output.array, (inputs.x, inputs.residual_or_dy), (inputs.mask,))
    given = None if out is None else output.array
    _calls.remember(FROZEN, call, inputs, state, given, relu)
    return output.finish(), Saved._of(forward)


FROZEN = _calls.new_store()


def normalize(
    x: ArrayT,
    moments: Moments,
    *,
    gamma: SupportsDLPack | None = None,
    beta: SupportsDLPack | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    mask: AnyArray | None = None,
    residual: Like[ArrayT] | None = None,
    relu: bool = False,
    out: ArrayT | None = None,
) -> ArrayT:
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
    known = type(moments) is Moments and type(eps) is float and type(channel_axis) is int
    if known and moments._count and 0 < eps < math.inf and (relu is False or relu is True):
        found = _calls.look_up(
            _NORMALIZATIONS, (x, mask, residual, gamma, beta, out), moments.num_features, channel_axis, relu
        )
        y = None if found is None else _normalized(*found, moments, eps, x, out)
        if y is not None:
            return y  # type: ignore[no-any-return]
    return _normalize(x, moments, gamma, beta, eps, channel_axis, mask, residual, relu, out)  # type: ignore[no-any-return]


@reporting_as("normalize")
def _normalize(
    x: Any,
    moments: Moments,
    gamma: Any,
    beta: Any,
    eps: float,
    channel_axis: int,
    mask: Any,
    residual: Any,
    relu: bool,
    out: Any,
) -> Any:
    """With every check."""
    if not isinstance(moments, Moments):
        remedy = "Use cubn.moments(x) to take them."
        raise TypeError(message("moments", "be Moments", type(moments).__name__, remedy))
    relu = flag(relu, "relu")
    inputs = bind_x(x, channel_axis, moments.num_features)
    if not moments.count:
        raise ValueError(message("moments", "be of at least one value per channel", moments.count))
    eps = checked_eps(eps)
    inputs = bind_mask_and_residual(bind_parameters(inputs, gamma=gamma, beta=beta), mask, residual)
    output = inputs.destination(out)
    held, operands = inputs.held, inputs.operands(output.array)
    options = NormalizeOptions(residual is not None, relu)
    prepared = inputs.backend.prepare_normalize(inputs.extents, operands, held.affine, options)
    at_x, at_residual, at_y, _, at_mask = (operand.pointer if operand else 0 for operand in operands)
    at_gamma, at_beta, *_ = held.addresses
    prepared(at_x, at_residual, at_y, at_mask, moments._place(eps, inputs.backend), at_gamma, at_beta)
    parameters = held.arrays.get("gamma"), held.arrays.get("beta")
    call = Call(
        prepared, inputs.backend, inputs.x, output.array, (inputs.x, inputs.residual_or_dy), (inputs.mask, *parameters)
    )
    if type(channel_axis) is int:
        arrays = (inputs.x, inputs.mask, inputs.residual_or_dy, *parameters, None if out is None else output.array)
        _calls.add(_NORMALIZATIONS, call, arrays, moments.num_features, channel_axis, relu)
    return output.finish()


_NORMALIZATIONS = _calls.new_store()


def _normalized(call: Call[Any, Any], at: list[int], moments: Moments, eps: float, x: Any, out: Any) -> Any | None:
    """A `normalize` like one that was made before; None where something is in its way."""
    at_x, at_mask, at_residual, at_gamma, at_beta, at_y = at
    y = out
    if y is None:
        y, at_y = call.allocate(x)
    elif not call.takes(out, at_y, (at_x, at_residual), (at_mask, at_gamma, at_beta), None):
        return None
    if at_y % ALIGNMENT != call.alignment:
        return None
    call.prepared(at_x, at_residual, at_y, at_mask, moments._place(eps, call.facts), at_gamma, at_beta)
    if out is not None and call.library.counts_versions:
        call.library.mark_written(out)
    return y


def _running(held: StateArrays) -> Running:
    if held.running is None:
        remedy = "Use forward_train, or normalize by moments(x)."
        raise ValueError(message("state", "have running statistics", "a state with track=False", remedy))
    return held.running
