"""Faults that people met, planted into real training runs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from tests.health.runs.planting import (
    a_bad_batch,
    a_jump,
    forgotten,
    frozen,
    halved,
    momentum_of,
    of_other_seeds,
    one_of_three,
    rounded,
    rounded_to_bfloat16,
    seeing,
    setting,
    starved,
    swapped,
    times,
    to,
    uncounted,
)
from tests.health.runs.settings import Settings
from tests.health.runs.training import Run, norms, train

NUMPY = Settings(seed=1, network="numpy perceptron", layers=3, width=24, rate=0.4)
PERCEPTRON = Settings(seed=2, network="perceptron", layers=3, width=40)
CONVOLUTIONAL = Settings(seed=3, network="convolutional", layers=2, width=16, library="cubn")
RESNET = Settings(seed=4, network="resnet8", steps=60)


def nothing(*_: Any) -> None:
    """What a fault does at times at which it does nothing."""


@dataclass(frozen=True)
class Fault:
    """A fault and where diagnosis has to see it.

    Attributes
    ----------
    name : str
    rules : set of str
        Any of these has to name it.
    layers : tuple of int, or None
        Which of the network's batch norms, in order; all of them for None.
    channels : tuple of int
        Which of these layers' channels; empty where it is layers as a whole.
    severity : {"error", "warning", "info"}
        How bad it has to be found.
    before, at_step, after : callable
        What plants it: before training (subject), after a step (subject, step), or when all is measured (run).
    data : bool
        Whether diagnosis is given Moments of the inputs, or the running statistics alone.
    ranks : callable, optional
        What ranks hold of it: the subject of each, from the run.
    """

    name: str
    rules: set[str]
    settings: Settings
    layers: tuple[int, ...] | None = None
    channels: tuple[int, ...] = ()
    severity: str = "error"
    before: Callable[[Any], None] = nothing
    at_step: Callable[[Any, int], None] = nothing
    after: Callable[[Run], None] = nothing
    data: bool = True
    ranks: Callable[[Run], list[Any]] | None = None

    def run(self):
        """The run that has it."""
        if (self.before, self.at_step) == (nothing, nothing):
            run = copy.deepcopy(_trained(self.settings))
        else:
            run = train(self.settings, self.before, self.at_step)
        self.after(run)
        return run

    def named(self, run):
        """The names of its layers."""
        names = list(norms(run.subject))
        return set(names if self.layers is None else (names[i] for i in self.layers))


@cache
def _trained(settings):
    """Without a fault."""
    return train(settings)


FAULTS = [
    Fault("NaN in a mean", {"non-finite"}, RESNET, (3,), (5,), after=setting((3,), "running_mean", to(np.nan), (5,))),
    Fault(
        "inf in variances",
        {"non-finite"},
        NUMPY,
        (1,),
        (0, 23),
        after=setting((1,), "running_var", to(np.inf), (0, 23)),
    ),
    Fault("an overflow in one batch", {"non-finite"}, PERCEPTRON, (1,), (7,), at_step=a_bad_batch(1, 7, {50})),
    Fault(
        "an overflow at the end",
        {"non-finite"},
        replace(PERCEPTRON, width=100),
        (2,),
        (99,),
        at_step=a_bad_batch(2, 99, {119}),
    ),
    Fault("NaN in gamma", {"non-finite"}, CONVOLUTIONAL, (1,), (2,), after=setting((1,), "gamma", to(np.nan), (2,))),
    Fault(
        "a negative variance",
        {"negative-variance"},
        NUMPY,
        (0,),
        (3,),
        after=setting((0,), "running_var", times(-1), (3,)),
    ),
    Fault(
        "negative variances",
        {"negative-variance"},
        RESNET,
        (0,),
        (0, 7),
        after=setting((0,), "running_var", to(-1e-7), (0, 7)),
    ),
    Fault(
        "a subnormal variance",
        {"subnormal-variance"},
        PERCEPTRON,
        (2,),
        (4, 9),
        after=setting((2,), "running_var", to(5.6e-45), (4, 9)),
    ),
    Fault(
        "a subnormal variance, without data",
        {"subnormal-variance"},
        CONVOLUTIONAL,
        (1,),
        (6,),
        severity="warning",
        after=setting((1,), "running_var", to(5.6e-45), (6,)),
        data=False,
    ),
    Fault(
        "a channel without inputs",
        {"subnormal-variance", "dead"},
        replace(CONVOLUTIONAL, momentum=0.5, steps=200),
        (1,),
        (11,),
        severity="info",
        at_step=starved(3, (11,)),
    ),
    Fault(
        "a channel that lost its inputs",
        {"collapsing"},
        PERCEPTRON,
        (1,),
        (17,),
        severity="info",
        at_step=starved(4, (17,), since=5),
    ),
    Fault(
        "a variance of nothing",
        {"dead"},
        RESNET,
        (2,),
        (1,),
        severity="warning",
        after=setting((2,), "running_var", to(1e-12), (1,)),
    ),
    Fault(
        "variances sunk under eps",
        {"dead"},
        NUMPY,
        (2,),
        (8, 9, 10),
        severity="warning",
        after=setting((2,), "running_var", to(1e-9), (8, 9, 10)),
    ),
    Fault("a gain of 1000 times", {"gain"}, PERCEPTRON, (1,), (2,), after=setting((1,), "gamma", times(1000), (2,))),
    Fault("a negative gain", {"gain"}, NUMPY, (0,), (10,), after=setting((0,), "gamma", times(-3000), (10,))),
    Fault(
        "a gain in a residual block", {"gain"}, RESNET, (4,), (15,), after=setting((4,), "gamma", times(2000), (15,))
    ),
    Fault("a layer in eval mode", {"never-updated"}, PERCEPTRON, (1,), before=frozen(1)),
    Fault("a block's layer in eval mode", {"never-updated"}, RESNET, (2,), before=frozen(2)),
    Fault("a momentum of 0", {"never-updated", "momentum"}, RESNET, (5,), before=momentum_of(5, 0.0)),
    Fault("statistics thrown away", {"never-updated"}, NUMPY, None, after=forgotten(())),
    Fault("statistics of one layer not loaded", {"never-updated"}, CONVOLUTIONAL, (1,), after=forgotten((1,))),
    Fault("Keras' 0.99 as torch's", {"momentum"}, replace(PERCEPTRON, momentum=0.99), None, severity="warning"),
    Fault("Keras' 0.9 as torch's", {"momentum"}, replace(NUMPY, momentum=0.9), None, severity="warning"),
    Fault("pixels from 0 to 16", {"stale"}, CONVOLUTIONAL, (0,), after=seeing(lambda images: images * 16)),
    Fault(
        "statistics of inverted images",
        {"stale"},
        replace(CONVOLUTIONAL, half=True),
        (0,),
        after=seeing(lambda images: 16 - 16 * images),
    ),
    Fault(
        "statistics of two layers exchanged",
        {"stale"},
        replace(PERCEPTRON, layers=4),
        (0, 3),
        severity="warning",
        after=swapped(0, 3),
    ),
    Fault("weights that jumped", {"stale"}, replace(PERCEPTRON, momentum=0.01), None, at_step=a_jump(110, 8)),
    Fault(
        "a deviation stored as a variance",
        {"stale"},
        RESNET,
        (6,),
        severity="warning",
        after=setting((6,), "running_var", lambda var: 1 / np.sqrt(var) ** 3),
    ),
    Fault("statistics in float16", {"16-bit"}, RESNET, (1,), severity="warning", after=halved(1)),
    Fault(
        "statistics rounded to float16",
        {"16-bit"},
        NUMPY,
        (1,),
        severity="warning",
        after=lambda run: [setting((1,), name, rounded)(run) for name in ("running_mean", "running_var")],
    ),
    Fault(
        "statistics rounded to bfloat16",
        {"16-bit"},
        PERCEPTRON,
        (2,),
        severity="warning",
        after=lambda run: [setting((2,), name, rounded_to_bfloat16)(run) for name in ("running_mean", "running_var")],
    ),
    Fault("counters lost", {"counts"}, RESNET, None, severity="warning", after=uncounted(())),
    Fault("counters of one layer lost", {"counts"}, PERCEPTRON, (0,), severity="warning", after=uncounted((0,))),
    Fault(
        "every third update skipped",
        {"skipped"},
        NUMPY,
        (1,),
        (3,),
        severity="warning",
        at_step=a_bad_batch(1, 3, range(0, 120, 3)),
    ),
    Fault(
        "updates skipped for the second half",
        {"skipped"},
        NUMPY,
        (2,),
        (20,),
        severity="warning",
        at_step=a_bad_batch(2, 20, range(1, 120, 2)),
    ),
    Fault("an eps of 1", {"eps"}, replace(CONVOLUTIONAL, eps=1.0), None, severity="warning"),
    Fault("a tiny eps", {"eps"}, replace(NUMPY, eps=1e-30), None, severity="warning"),
    Fault("a rank with another mean", {"ranks"}, NUMPY, (1,), (4,), ranks=one_of_three(1, "running_mean", 4)),
    Fault("a rank with another gamma", {"ranks"}, RESNET, (2,), (6,), ranks=one_of_three(2, "gamma", 6)),
    Fault("ranks that trained alone", {"ranks"}, CONVOLUTIONAL, None, ranks=of_other_seeds),
]
