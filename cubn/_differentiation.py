"""A backward with every check: its arguments, its outputs, what it computes and leaves for others like it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, get_args

import numpy as np

from cubn import _arguments, _arrays, _calls
from cubn._arguments import flag, one_of, refusal, region
from cubn._arrays import Array, Layout, Library, Output
from cubn._arrays.library import ALIGNMENT, Allocate
from cubn._calls import Call
from cubn._floating_point import default_floating_point
from cubn._inputs import Inputs, like_x
from cubn._layout import vector
from cubn._types import BOOL, FLOATS, GradientOptions, Nodes, Vector
from cubn.backends import threads
from cubn.backends.protocol import PreparedBackward, Sums
from cubn.errors import message
from cubn.gradients import Gradients, StatisticsGradients
from cubn.saved import Forward
from cubn.sync.collective import Gathered, Terms
from cubn.typing import ParameterGradients

BACKWARDS = _calls.new_store()
WHOSE: tuple[ParameterGradients, ...] = get_args(ParameterGradients)

AnyGradients = Gradients[Any] | StatisticsGradients[Any]
OfChannels = tuple[Any, Any, Any, Any]  # dgamma, dbeta, dmean, dvar


class Facts(NamedTuple):
    """What of a backward does not differ between calls with one signature."""

    x: Layout
    mask: Layout | None
    version: Callable[[Any], int | None]  # of a mask
    dresidual: tuple[Allocate, int] | None  # and the remainder of its address
    dgamma: tuple[str, Allocate] | None  # the parameter beside which it is made, and how
    dbeta: tuple[str, Allocate] | None


class Differentiation:
    """A backward whose arguments were checked and whose outputs are ready; nothing is written yet."""

    def __init__(
        self,
        dy: Any,
        forward: Forward,
        parameter_gradients: ParameterGradients,
        statistics: bool,
        out: Any,
    ) -> None:
        self.everywhere = one_of(WHOSE, parameter_gradients, "parameter_gradients") == "global"
        self.by_statistics = flag(statistics, "statistics")
        if self.by_statistics and not forward.frozen:
            rule, remedy = (
                "be False unless the statistics are frozen",
                "What passes through a batch's own is part of dx.",
            )
            raise ValueError(message("statistics", rule, True, remedy))
        self.forward = forward
        layouts = forward.layouts
        inputs = forward.inputs
        self.inputs = inputs = inputs._replace(residual_or_dy=like_x("dy", dy, inputs.x))
        self.backend, x = inputs.backend, inputs.x
        check_unchanged(forward, inputs)
        self.in_given = out is not None
        if out is None:
            self.dx = _arrays.empty_like(x)
        else:
            masked = (region("mask", inputs.mask),) if inputs.mask else ()
            self.dx = _arguments.destination(out, x, {"dy": inputs.residual_or_dy}, (region("x", x), *masked))
        self.dresidual = _arrays.empty_like(x) if layouts.residual else None
        self.dgamma, self.dbeta = _parameter_outputs(forward)
        self.operands = inputs.operands(self.dx.array, self.dresidual and self.dresidual.array)
        self.options = GradientOptions(layouts.relu, forward.frozen, layouts.residual)

    @cached_property
    def terms(self) -> Terms:
        return terms_of("backward", self.forward, self.everywhere)

    def run(self) -> AnyGradients:
        """The whole batch is here."""
        forward = self.forward
        if forward.layouts.renorm or (self.in_given and self._may_fail()):
            own = self.backend.root_sums(self.part(0, self.inputs.extents.N))
            return self._apply(own, own)
        prepared = self.backend.prepare_backward(
            self.inputs.extents, self.operands, forward.statistics, forward.relu_mask, self.parameters, self.options
        )
        x, dy, dx, dresidual, mask = (operand.pointer if operand else 0 for operand in self.operands)
        dgamma, dbeta = (output.array.pointer if output else 0 for output in (self.dgamma, self.dbeta))
        at = x, dy, dx, dresidual, mask
        sums = prepared(*at, forward.statistics, forward.relu_mask, dgamma, dbeta, self.by_statistics)
        if not self.by_statistics:
            self._remember(prepared)
        return self._written(self._of_channels(sums))

    def _remember(self, prepared: PreparedBackward) -> None:
        """For calls that have the same signature."""
        forward, (x, _, _, _, _, mask, dy, _) = self.forward, self.inputs
        assert dy is not None
        like_x, like_mask, like_dy = (array and array.library.layout(array) for array in (x, mask, dy))
        given = self.dx.array.library.layout(self.dx.array) if self.in_given else None
        outputs = self.dgamma, self.dbeta
        known = (like_mask or not mask) and (given or not self.in_given)
        if (
            like_x is None
            or like_dy is None
            or not known
            or forward.overwritten
            or any(d and d.array.library.adopts for d in outputs)
        ):
            return
        gamma, beta = (_allocator(name, forward) if self.dgamma else None for name in _homes(forward).values())
        version = (mask or x).library.version
        facts = Facts(like_x, like_mask, version, self.dresidual and _of(self.dresidual.array, x), gamma, beta)
        call = Call(prepared, facts, x, self.dx.array, (dy,), (x, mask))
        kept = None if forward.relu_mask is None else forward.relu_mask.layout
        key = (forward.layouts, forward.held.layout, kept, like_dy, given, forward.frozen, threads.limit)
        BACKWARDS.add(key, call)

    def part(self, start: int, total: int) -> Nodes:
        extents, forward = self.inputs.extents, self.forward
        return self.backend.backward_sums(
            extents, self.operands, forward.statistics, forward.relu_mask, self.options, start
        )

    def accept(self, values: int) -> None:
        """The forward has been."""

    def finish(self, gathered: Gathered) -> AnyGradients:
        sums = self.backend.root_sums(gathered.nodes) if self.terms.gathers else None
        needed = self.parameters or self.by_statistics
        own = (sums if self.everywhere else self.backend.root_sums(gathered.own)) if needed else None
        return self._apply(own, sums)

    def _apply(self, own: Sums | None, sums: Sums | None) -> AnyGradients:
        """Gradients of channels from own sums, then dx from those of all ranks: what may fail comes before `out`."""
        forward = self.forward
        if self.parameters and own:
            self.backend.parameter_gradients(forward.statistics, own, *self.parameters)
        of_channels = self._of_channels(own)
        applied = None if forward.frozen else sums
        self.backend.backward_apply(
            self.inputs.extents, self.operands, forward.statistics, forward.relu_mask, applied, self.options
        )
        return self._written(of_channels)

    @property
    def parameters(self) -> tuple[Vector, Vector] | None:
        """dgamma and dbeta."""
        if self.dgamma is None or self.dbeta is None:
            return None
        return vector(self.dgamma.array), vector(self.dbeta.array)

    def _may_fail(self) -> bool:
        """Whether a library makes gradients of channels of its own accord."""
        return self.by_statistics or any(d and d.array.library.adopts for d in (self.dgamma, self.dbeta))

    def _of_channels(self, sums: Sums | None) -> OfChannels:
        """What of the gradients of channels is asked for; `parameters` are written."""
        given = self.forward.held.arrays
        return (
            self.dgamma.finish() if self.dgamma and "gamma" in given else None,
            self.dbeta.finish() if self.dbeta and "beta" in given else None,
            *(self._of_statistics(sums) if self.by_statistics and sums else (None, None)),
        )

    @default_floating_point
    @np.errstate(all="ignore")
    def _of_statistics(self, sums: Sums) -> tuple[Any, Any]:
        """The gradients by given mean and variance, of which invstd is a function."""
        statistics, home = self.forward.statistics, self.forward.held.arrays["running_mean"]
        sum_dy, sum_dy_xmu = map(self.backend.to_host, sums)
        found = self.backend.statistics_on_host(statistics)
        invstd = found.invstd
        scale = invstd * found.row("gamma") if statistics.gamma else invstd
        dmean, dvar = -(sum_dy * scale), -0.5 * (sum_dy_xmu * scale * (invstd * invstd))
        new = home.library.from_numpy
        return new(dmean, home.dtype, home), new(dvar, home.dtype, home)

    def _written(self, of_channels: OfChannels) -> AnyGradients:
        dgamma, dbeta, dmean, dvar = of_channels
        dx, dresidual = self.dx.finish(), self.dresidual and self.dresidual.finish()
        if self.by_statistics:
            return StatisticsGradients(dx, dgamma, dbeta, dresidual, dmean, dvar)
        return Gradients(dx, dgamma, dbeta, dresidual)


def terms_of(operation: str, forward: Forward, everywhere: bool) -> Terms:
    """What a rank says of the gradient of a forward; `everywhere`: that parameter gradients are to be global."""
    layouts = forward.layouts
    on = {
        "relu": layouts.relu != "none",
        "residual": layouts.residual,
        "frozen": forward.frozen,
        "global parameter gradients": everywhere,
    }
    return Terms(
        operation,
        layouts.extents.C,
        layouts.extents.N,
        layouts.x.dtype,
        forward=forward.context.exchange if forward.context else 0,
        options=frozenset(name for name in on if on[name]),
        gathers=everywhere or not forward.frozen,
    )


def _homes(forward: Forward) -> dict[str, str]:
    """Beside which parameters dgamma and dbeta are made: their own, or the other where there is but one of them."""
    given = forward.held.arrays
    either = "gamma" if "gamma" in given else "beta"
    return {
        "dgamma": "gamma" if "gamma" in given else either,
        "dbeta": "beta" if "beta" in given else either,
    }


def _parameter_outputs(forward: Forward) -> tuple[Output | None, Output | None]:
    """Where dgamma and dbeta go."""
    if not forward.held.arrays.keys() & {"gamma", "beta"}:
        return None, None
    homes = (forward.held.arrays[name] for name in _homes(forward).values())
    dgamma, dbeta = (_arrays.empty_vector(forward.layouts.extents.C, home.dtype, home) for home in homes)
    return dgamma, dbeta


def _of(dresidual: Array, x: Array) -> tuple[Allocate, int]:
    """How arrays like dresidual are made, which need not have the layout of dx."""
    allocate = x.library.allocator(dresidual.shape, dresidual.strides, dresidual.dtype, x)
    return allocate, dresidual.pointer % ALIGNMENT


def _allocator(name: str, forward: Forward) -> tuple[str, Allocate]:
    """How vectors like one of the parameters are made."""
    home, shape = forward.held.arrays[name], (forward.layouts.extents.C,)
    if home.library is forward.layouts.x.library:
        return name, home.library.allocator(shape, (1,), home.dtype, home)
    return name, Library.allocator(home.library, shape, (1,), home.dtype, home)


def check_unchanged(forward: Forward, inputs: Inputs) -> None:
    """x and the mask must hold what the forward read: the gradient depends on it."""
    out = "Give the forward an `out` of its own, and change x only after the last backward."
    if forward.overwritten:
        rule = "be kept until backward, but y was written over it"
        raise ValueError(refusal("x", rule, inputs.x, out))
    for name, array, read in (("x", inputs.x, forward.x), ("mask", inputs.mask, forward.mask)):
        if array is None or read is None or array.capsule is not None:
            continue  # an export holds its memory, and may be another one each time
        now = _arrays.describe(array.owner, name, BOOL if name == "mask" else FLOATS, detach=True)
        if now[:4] != array[:4] or array.library.version(now.owner) != read.version:
            rule = "be as it was in the forward, but was changed since"
            remedy = out if name == "x" else "Change it only after the last backward."
            raise ValueError(refusal(name, rule, now, remedy))
