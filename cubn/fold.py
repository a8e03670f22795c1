"""Batch norm in other forms: as a scale and shift, and inside the weights of the layer before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays
from cubn._arguments import as_int, on_host, refusal
from cubn._arrays import Array
from cubn._floating_point import default_floating_point
from cubn._state.arrays import STATISTICS, check_values, described
from cubn.errors import message, reporting_as
from cubn.state import BatchNormState, checked_state
from cubn.typing import ArrayT, SupportsDLPack

Float64 = NDArray[np.float64]


@default_floating_point
@reporting_as("fold")
def fold(state: BatchNormState) -> tuple[Any, Any]:
    """The scale and shift that `forward` amounts to.

    scale = gamma / sqrt(running_var + eps) and shift = beta - running_mean * scale, so that y is x * scale + shift.

    Parameters
    ----------
    state : BatchNormState
        With running statistics.

    Returns
    -------
    scale, shift : array of shape (C,)
        Computed in float64 and rounded once to running_var's dtype; of its library, on its device.

    Raises
    ------
    TypeError
        If state is not a BatchNormState.
    ValueError
        If the state has no running statistics, or a running_var is negative.

    Warns
    -----
    StateWarning
        If running statistics hold a NaN or an infinity.

    Notes
    -----
    x * scale + shift has other bits than `forward`, and cancels where the mean is large beside the standard deviation.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch normalization", https://arxiv.org/abs/1502.03167
    """
    scale, shift, home = _folded(state)
    with np.errstate(all="ignore"):
        return home.library.from_numpy(scale, home.dtype, home), home.library.from_numpy(shift, home.dtype, home)


@default_floating_point
@reporting_as("fold_into")
def fold_into(
    weight: ArrayT, bias: SupportsDLPack | None, state: BatchNormState, *, output_axis: int = 0, groups: int = 1
) -> tuple[ArrayT, Any]:
    """Weight and bias with which a convolution or linear layer does its batch norm too.

    weight' = weight * scale along the output channels and bias' = bias * scale + shift, with scale and shift as in
    `fold`: the layer with weight' and bias' is the layer followed by `forward`.

    Parameters
    ----------
    weight : array of any library
        float16, bfloat16, float32 or float64, with C output channels along output_axis. Read detached.
    bias : array of shape (C,), or None
        The layer's own; None counts as 0.
    state : BatchNormState
        Of C channels, with running statistics.
    output_axis : int
        The output channels' axis in weight: 0 for PyTorch's convolutions and linear layers, 1 for its transposed
        convolutions, -1 for Flax and Keras. May be negative.
    groups : int
        Of a transposed convolution, where output_axis holds C / groups channels, and axis 0 the input channels group by
        group (PyTorch). A grouped convolution that is not transposed has all C on output_axis: leave it 1.

    Returns
    -------
    weight, bias : array
        New ones: weight in its own dtype and library; bias in its own, or the weight's where it was None.

    Raises
    ------
    TypeError
        If weight or bias is not an array of these dtypes, or state is not a BatchNormState.
    ValueError
        If a shape does not fit, or the state has no running statistics, or a running_var is negative.
    numpy.exceptions.AxisError
        If weight has no such output_axis.

    Warns
    -----
    StateWarning
        As in `fold`.

    Notes
    -----
    Computed in float64 and rounded once. The folded layer has other bits than the layer followed by `forward`.
    """
    array = _arrays.describe(weight, "weight", detach=True)
    given = None if bias is None else _arrays.describe(bias, "bias", detach=True)
    scale, shift, _ = _folded(state)
    along = _along_outputs(scale, array, output_axis, groups)
    if given is not None and given.shape != scale.shape:
        raise ValueError(refusal("bias", f"have shape {scale.shape}, one value per channel", given))
    offset = 0.0 if given is None else on_host(given).astype(np.float64)
    home = given or array
    with np.errstate(all="ignore"):
        return (
            array.library.from_numpy(on_host(array) * along, array.dtype, array),
            home.library.from_numpy(offset * scale + shift, home.dtype, home),
        )


def _folded(state: BatchNormState) -> tuple[Float64, Float64, Array]:
    """scale, shift, and the array they are like."""
    if checked_state(state).running_var is None:
        remedy = "Only running statistics can be folded: a batch's own differ from batch to batch."
        raise ValueError(message("state", "have running statistics", "a state with track=False", remedy))
    held = state.to_dict()
    found = {name: (described(getattr(state, name), name), held[name]) for name in STATISTICS}
    check_values(found)
    home = found["running_var"][0]
    gamma = held["gamma"].astype(np.float64) if "gamma" in held else 1.0
    beta = held["beta"].astype(np.float64) if "beta" in held else 0.0
    with np.errstate(all="ignore"):  # of what is not finite, the state's own warning tells
        scale = gamma / np.sqrt(held["running_var"].astype(np.float64) + held["eps"])
        return scale, beta - held["running_mean"] * scale, home


def _along_outputs(scale: Float64, weight: Array, output_axis: int, groups: int) -> Float64:
    """scale placed to multiply the weight."""
    shape = weight.shape
    axis = as_int(output_axis, "output_axis")
    if not -len(shape) <= axis < len(shape):
        rule = f"be at least {-len(shape)} and below {len(shape)}"
        raise np.exceptions.AxisError(message("output_axis", rule, axis))
    axis %= len(shape)
    groups = as_int(groups, "groups")
    if not 1 <= groups <= scale.size:
        raise ValueError(message("groups", f"be from 1 to the {scale.size} channels", groups))
    if shape[axis] * groups != scale.size:
        rule = f"have {scale.size} output channels on axis {axis}" + (f" in {groups} groups" if groups != 1 else "")
        raise ValueError(refusal("weight", rule, weight, _meant(scale.size, shape, axis)))
    if groups == 1:
        return scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if axis == 0 or shape[0] % groups:
        rule = f"have input channels on axis 0, a multiple of groups={groups}, and outputs on another"
        raise ValueError(refusal("weight", rule, weight))
    rows = np.repeat(scale.reshape(groups, -1), shape[0] // groups, axis=0)
    return rows.reshape([shape[0] if i == 0 else -1 if i == axis else 1 for i in range(len(shape))])


def _meant(C: int, shape: tuple[int, ...], axis: int) -> str:
    """What the layer may be, if C output channels are not where they were said to be."""
    if shape[axis] == C:
        return "It has all of them on that axis: leave groups at 1."
    groups, rest = divmod(C, shape[axis] or C + 1)
    if axis and not rest and shape[0] % groups == 0:
        return f"A transposed convolution of {groups} groups fits: pass groups={groups}."
    return "output_axis says which axis that is."
