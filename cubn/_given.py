"""What a forward is given: x and what goes with it, where y goes, and the parameters that a backward will need."""

from __future__ import annotations

from typing import Any, NamedTuple

from cubn import _arguments, _arrays
from cubn._arguments import Companion, Source, region
from cubn._arrays import Array, Output
from cubn._layout import operand
from cubn._types import Affine, BackendArray, Operands, Vector
from cubn.state import BatchNormState, Held, checked_state, hold


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

    def destination(self, function: str, out: Any) -> Output:
        """Where y goes: a new array, or `out`."""
        source, held, mask, residual = self
        if out is None:
            return _arrays.empty_like(source.array)
        in_place = {"x": source.array, "residual": residual and residual.array}
        masked = (region("mask", mask.array),) if mask else ()
        return _arguments.destination(function, out, source, in_place, (*masked, *held.regions))


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


def given_with_state(function: str, x: Any, state: BatchNormState, mask: Any, residual: Any) -> Given:
    """x, the state's arrays, mask and residual."""
    checked_state(state, function)
    source = _arguments.source(function, x, state.channel_axis, state.num_features)
    return beside(function, source, state._read(function, source.array), mask, residual)


def given_parameters(function: str, gamma: Any, beta: Any, source: Source) -> Held:
    """gamma and beta, where they are given."""
    given = {"gamma": gamma, "beta": beta}
    return hold({n: _arguments.parameter(function, n, a, source) for n, a in given.items() if a is not None}, function)


def beside(function: str, source: Source, held: Held, mask: Any, residual: Any) -> Given:
    """x, the arrays of channels, mask and residual."""
    return Given(
        source,
        held,
        None if mask is None else _arguments.mask(function, mask, source),
        None if residual is None else _arguments.beside(function, "residual", residual, source),
    )


def overwrites(out: Any, y: Output, x: Source) -> bool:
    """Whether y was written over x."""
    return out is not None and _arrays.overlap(y.array, x.array) != "none"


def gate_kind(relu: bool, given: Given) -> str:
    """How the backward will know what a ReLU stopped; see `Gate`."""
    if not relu:
        return "none"
    return "recompute" if given.residual is None else "bits"


def new_parameters(given: Given) -> Parameters:
    """Room for gamma and beta as they are now, still to be written."""
    source, held, _, _ = given

    def new(name: str, parameter: Vector | None) -> Kept | None:
        if parameter is None:
            return None
        values, vector = source.backend.new_vector(source.extents.C)
        return Kept(vector, values, held.arrays[name])

    return Parameters(new("gamma", held.affine.gamma), new("beta", held.affine.beta))


def kept_parameters(given: Given) -> Parameters:
    """gamma and beta as they are now."""
    source, held, _, _ = given
    parameters = new_parameters(given)
    if any(parameters):
        source.backend.keep(held.affine, parameters.affine, source.extents.C)
    return parameters
