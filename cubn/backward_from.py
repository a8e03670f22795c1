"""The gradient of a normalisation whose statistics the caller kept."""

from __future__ import annotations

from typing import Literal, overload

from cubn._arguments import as_int, flag
from cubn._differentiation import Differentiation
from cubn._inputs import Inputs, bind_mask_and_residual, bind_parameters, bind_x, joined, parameter, relu_gradient
from cubn._layout import vector
from cubn._state.arrays import checked_arrays
from cubn.errors import message, reporting_as
from cubn.gradients import Gradients, StatisticsGradients
from cubn.saved import Forward, Layouts, Read
from cubn.typing import AnyArray, ArrayT, Like, SupportsDLPack


@overload
def backward_from(
    dy: Like[ArrayT],
    x: ArrayT,
    *,
    mean: SupportsDLPack,
    invstd: SupportsDLPack,
    gamma: SupportsDLPack | None = None,
    beta: SupportsDLPack | None = None,
    mask: AnyArray | None = None,
    relu: bool = False,
    count: int | None = None,
    frozen: bool = False,
    statistics: Literal[False] = False,
    channel_axis: int = 1,
    out: ArrayT | None = None,
) -> Gradients[ArrayT]: ...


@overload
def backward_from(
    dy: Like[ArrayT],
    x: ArrayT,
    *,
    mean: SupportsDLPack,
    invstd: SupportsDLPack,
    gamma: SupportsDLPack | None = None,
    beta: SupportsDLPack | None = None,
    mask: AnyArray | None = None,
    relu: bool = False,
    count: int | None = None,
    frozen: Literal[True],
    statistics: Literal[True],
    channel_axis: int = 1,
    out: ArrayT | None = None,
) -> StatisticsGradients[ArrayT]: ...


@reporting_as("backward_from")
def backward_from(
    dy: Like[ArrayT],
    x: ArrayT,
    *,
    mean: SupportsDLPack,
    invstd: SupportsDLPack,
    gamma: SupportsDLPack | None = None,
    beta: SupportsDLPack | None = None,
    mask: AnyArray | None = None,
    relu: bool = False,
    count: int | None = None,
    frozen: bool = False,
    statistics: bool = False,
    channel_axis: int = 1,
    out: ArrayT | None = None,
) -> Gradients[ArrayT] | StatisticsGradients[ArrayT]:
    """`backward` of a normalisation whose statistics the caller kept, without a Saved.

    With y = (x - mean) * invstd * gamma + beta, then ReLU. The formulas are those of `backward`; with the mean and
    invstd of a Saved, so are the bits.

    Parameters
    ----------
    dy, out
        As in `backward`.
    x : array of any library, rank 2 or more, C channels on channel_axis
        What was normalised.
    mean, invstd : array of shape (C,), any library, x's device
        What x was normalised by; invstd = 1 / sqrt(var + eps). In float64 for the bits of `backward`; float16, bfloat16
        and float32 are widened.
    gamma, beta : array of shape (C,), any library, x's device, optional
        As in the forward. Without them 1 and 0, and no gradient. beta matters behind a ReLU only.
    mask : bool array on x's device, optional
        As in the forward.
    relu : bool
        Whether a ReLU followed. (Behind a residual addition and a ReLU, stop dy where y <= 0 and leave this False.)
    count : int, optional
        Values per channel of which mean and invstd were taken: what sums are divided by in dx. By default those of x
        that are present. The sums are of this x alone: for a part of a larger batch dx is not right whatever the
        count, and `comm=` is what does it. Not used with `frozen`.
    frozen : bool
        Whether mean and invstd were given, not taken of x: dx = dy * gamma * invstd.
    statistics : bool
        With `frozen`: whether dmean and dvar are wanted, in mean's dtype and library.
    channel_axis : int
        The channels' axis in x; may be negative.

    Returns
    -------
    Gradients
        (dx, dgamma, dbeta, None).
    StatisticsGradients
        (dx, dgamma, dbeta, None, dmean, dvar), with `statistics=True`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, BackendUnavailable, ImportError
        If an argument does not fit; the message says what is asked for.

    Notes
    -----
    The same bits for every layout, number of threads and array library. Reads x and dy twice from memory at most, and
    writes dx once.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.random.default_rng(0).standard_normal((8, 3, 5))
    >>> mean, invstd = x.mean((0, 2)), 1 / np.sqrt(x.var((0, 2)) + 1e-5)
    >>> cubn.backward_from(np.ones_like(x), x, mean=mean, invstd=invstd)
    Gradients(dx=float64 (8, 3, 5), dgamma=None, dbeta=None, dresidual=None)
    """
    relu, frozen = flag(relu, "relu"), flag(frozen, "frozen")
    inputs = bind_mask_and_residual(bind_x(x, channel_axis), mask)
    given = [parameter(*named, inputs) for named in (("mean", mean), ("invstd", invstd))]
    inputs = joined(bind_parameters(inputs, gamma=gamma, beta=beta), *given)
    held, place = inputs.held, inputs.backend
    values = 0 if frozen else _count(count, inputs)
    forward = Forward(
        Layouts.of(inputs, relu_gradient(relu, residual=False)),
        Read.of(inputs.x),
        inputs.mask and Read.of(inputs.mask),
        checked_arrays({**held.arrays, "running_mean": given[0]}),
        place.given_statistics(inputs.extents.C, values, vector(given[0]), vector(given[1]), held.affine),
        None,
        frozen=frozen,
    )
    return Differentiation(dy, forward, "local", statistics, out).run()


def _count(count: int | None, inputs: Inputs) -> int:
    """Values per channel that the statistics are of."""
    if count is None:
        present = inputs.values
        if present is None:
            rule, remedy = "be given together with a mask on a device", "It is how many positions are present."
            raise ValueError(message("count", rule, None, remedy))
        return present
    number = as_int(count, "count")
    if not 0 < number < 1 << 63:
        raise ValueError(message("count", "be 1 or more and less than 2**63", number))
    return number
