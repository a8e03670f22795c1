"""The forward operations on given statistics: inference, fine-tuning, and normalisation by moments."""

from __future__ import annotations

from cubn import _arguments
from cubn._arguments import flag
from cubn._given import beside, gate_kind, given_parameters, given_with_state, kept_parameters, overwrites
from cubn._moments import Moments
from cubn.backends import Gate, Vector
from cubn.errors import message
from cubn.moments import statistics_of
from cubn.saved import Forward, Saved, as_read
from cubn.state import BatchNormState, Held, checked_eps
from cubn.sync import communicator
from cubn.sync.collective import SyncContext, check_sizes
from cubn.typing import AnyArray, ArrayT, Comm, Like, Sizes, SupportsDLPack


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
    relu = flag(relu, "forward", "relu")
    given = given_with_state("forward", x, state, mask, residual)
    source, held = given.source, given.held
    running = _running(held, "forward")
    output = given.destination("forward", out)
    source.backend.forward(source.extents, given.arrays(output), running, state.eps, held.affine, relu=relu)
    y: ArrayT = output.finish()
    return y


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
    check_sizes("forward_frozen", sizes, comm)
    relu = flag(relu, "forward_frozen", "relu")
    group = None if comm is None else communicator(comm)
    given = given_with_state("forward_frozen", x, state, mask, residual)
    source, held, _, _ = given
    place = SyncContext.without_exchange("forward_frozen", group, sizes, source.extents.N) if group else None
    running = _running(held, "forward_frozen")
    output = given.destination("forward_frozen", out)
    parameters = kept_parameters(given)
    kind = gate_kind(relu, given)
    statistics = source.backend.frozen_statistics(running, source.extents.C, state.eps)
    then = {"relu": relu, "keep_bits": kind == "bits"}
    bits = source.backend.normalize(source.extents, given.arrays(output), statistics, parameters.affine, **then)
    y = output.finish()
    return y, Saved._of(
        Forward(
            source,
            given.mask,
            residual is not None,
            statistics,
            parameters,
            Gate(kind, bits),
            as_read(source, given.mask),
            frozen=held.arrays["running_mean"],
            overwritten=overwrites(out, output, source),
            place=place,
        )
    )


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
    if not isinstance(moments, Moments):
        remedy = "Use cubn.moments(x) to take them."
        raise TypeError(message("normalize", "moments", "be Moments", type(moments).__name__, remedy))
    relu = flag(relu, "normalize", "relu")
    source = _arguments.source("normalize", x, channel_axis, moments.num_features)
    if not moments.count:
        raise ValueError(message("normalize", "moments", "be of at least one value per channel", moments.count))
    eps = checked_eps(eps, "normalize")
    held = given_parameters("normalize", gamma, beta, source)
    given = beside("normalize", source, held, mask, residual)
    output = given.destination("normalize", out)
    statistics = statistics_of(moments, eps, source.backend)
    source.backend.normalize(source.extents, given.arrays(output), statistics, held.affine, relu=relu, keep_bits=False)
    y: ArrayT = output.finish()
    return y


def _running(held: Held, function: str) -> tuple[Vector, Vector]:
    if held.running is None:
        remedy = "Use forward_train, or normalize by moments(x)."
        raise ValueError(message(function, "state", "have running statistics", "a state with track=False", remedy))
    return held.running
