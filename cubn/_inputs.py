"""What an operation is given, checked: x, the arrays of its channels, a mask, and a residual or dy."""

from __future__ import annotations

from typing import Any, NamedTuple

from cubn import _arguments, _arrays, _layout
from cubn._arguments import as_int, refusal, region
from cubn._arrays import Array, Output
from cubn._layout import operand
from cubn._state.arrays import StateArrays, checked_arrays
from cubn._state.options import Options
from cubn._types import BOOL, Extents, Operands, ReluGradient
from cubn.backends import backend_for
from cubn.backends.protocol import Backend
from cubn.state import BatchNormState, checked_state

NO_ARRAYS = StateArrays({}, None, None)


class Inputs(NamedTuple):
    """Everything that an operation reads. Nothing is written here."""

    x: Array
    axis: int  # of the channels
    extents: Extents
    backend: Backend
    held: StateArrays
    mask: Array | None = None
    residual_or_dy: Array | None = None
    options: Options | None = None  # of the state, as they were when it was asked for the first

    def operands(self, y: Array | None = None, r: Array | None = None) -> Operands:
        """As kernels see them, and what they write."""
        x, axis, _, _, _, mask, residual_or_dy, _ = self
        return Operands(
            operand(x, axis),
            residual_or_dy and operand(residual_or_dy, axis),
            y and operand(y, axis),
            r and operand(r, axis),
            mask and _layout.mask_operand(mask, x.shape, axis),
        )

    def destination(self, out: Any) -> Output:
        """Where y goes: a new array, or `out`."""
        if out is None:
            return _arrays.empty_like(self.x)
        apart = (region("mask", self.mask),) if self.mask else ()
        in_place = {"x": self.x, "residual": self.residual_or_dy}
        return _arguments.destination(out, self.x, in_place, (*apart, *self.held.regions))

    @property
    def values(self) -> int | None:
        """How many values of a channel are present; None where only the device knows."""
        return _arguments.values_per_channel(self.extents, self.mask)


def bind(x: Any, state: BatchNormState, mask: Any, residual: Any) -> Inputs:
    """x, the state's arrays, mask and residual."""
    checked_state(state)
    options = state._options
    inputs = bind_x(x, state.channel_axis, state.num_features)
    inputs = inputs._replace(held=state._read(inputs.x), options=options)
    return bind_mask_and_residual(inputs, mask, residual)


def bind_x(x: Any, channel_axis: int, num_features: int | None = None) -> Inputs:
    """x, with the given number of channels if there is one."""
    array = _arrays.describe(x, "x")
    shape = array.shape
    if len(shape) < 2:
        remedy = "Samples and channels are two axes: a single sample has shape (1, C)."
        raise ValueError(refusal("x", "have 2 axes or more", array, remedy))
    axis = _layout.channel_position(len(shape), as_int(channel_axis, "channel_axis"))
    extents = _layout.extents(shape, axis)
    if not extents.C or num_features not in (None, extents.C):
        rule = f"have {num_features or '1 or more'} channels on axis {axis}"
        raise ValueError(refusal("x", rule, array, "channel_axis says which axis that is."))
    return Inputs(array, axis, extents, backend_for(array.device, array.library.name), NO_ARRAYS)


def joined(inputs: Inputs, *arrays: Array | None) -> Inputs:
    """The inputs, with a backend for all libraries that they and these arrays are of: each may have a stream."""
    if inputs.backend.device is None:
        return inputs
    given = (inputs.x, inputs.mask, *inputs.held.arrays.values(), *arrays)
    libraries = dict.fromkeys(array.library.name for array in given if array is not None)
    return inputs if len(libraries) == 1 else inputs._replace(backend=backend_for(inputs.x.device, *libraries))


def bind_parameters(inputs: Inputs, **given: Any) -> Inputs:
    """Arrays of channels, where they are given."""
    arrays = {name: parameter(name, array, inputs) for name, array in given.items() if array is not None}
    return inputs._replace(held=checked_arrays(arrays))


def bind_mask_and_residual(inputs: Inputs, mask: Any, residual: Any = None) -> Inputs:
    """A mask and a residual, where they are given."""
    return joined(
        inputs._replace(
            mask=None if mask is None else _mask(mask, inputs),
            residual_or_dy=None if residual is None else like_x("residual", residual, inputs.x),
        )
    )


def parameter(argument: str, given: Any, inputs: Inputs) -> Array:
    """A per-channel array of any library on x's device."""
    array = _arrays.describe(given, argument, detach=True)
    C = inputs.extents.C
    if array.shape != (C,):
        raise ValueError(refusal(argument, f"have shape ({C},), one value per channel", array))
    _arguments.check_device(argument, array, inputs.x)
    return array


def like_x(argument: str, given: Any, x: Array) -> Array:
    """Values that go with x's, of its shape, dtype, library and device."""
    array = _arrays.describe(given, argument)
    _arguments.check_like(argument, array, x)
    return array


def _mask(given: Any, inputs: Inputs) -> Array:
    """Which positions of x are present."""
    array, x, axis = _arrays.describe(given, "mask", BOOL), inputs.x, inputs.axis
    _arguments.check_device("mask", array, x)
    if _layout.mask_operand(array, x.shape, axis) is None:
        shape = x.shape[:axis] + x.shape[axis + 1 :]
        rule = f"have x's shape without the channel axis, {shape}, or 1 instead of any extent"
        raise ValueError(refusal("mask", rule, array))
    return array


def relu_gradient(relu: bool, residual: bool) -> ReluGradient:
    """How the backward will know what a ReLU stopped."""
    if not relu:
        return "none"
    return "mask" if residual else "recompute"


def overwrites(out: Any, y: Output, x: Array) -> bool:
    """Whether y was written over x."""
    return out is not None and _arrays.overlap(y.array, x) != "none"
