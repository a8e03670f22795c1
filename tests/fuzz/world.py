"""Arrays that would be right, what is made of them, and all that a state is used for."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

import cubn
from tests.fuzz.memory import Pages

SHAPE, C = (3, 4, 2), 4


class World:
    """Arrays between guard pages, and what can be made of them; `renew` puts everything back."""

    arrays = ("x", "residual", "dy", "out", "mask", "gamma", "beta", "running_mean", "running_var", "weight", "bias")
    arrays += ("mean", "invstd", "var")
    count = 6

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shapes = dict.fromkeys(self.arrays, SHAPE) | dict.fromkeys(self.arrays[5:9], (C,))
        shapes |= {"mask": (3, 2), "weight": (C, C)} | dict.fromkeys(("bias", "mean", "invstd", "var"), (C,))
        dtypes = dict.fromkeys(self.arrays, np.dtype("f4")) | {"mask": np.dtype(bool)}
        sizes = {name: math.prod(shapes[name]) * dtypes[name].itemsize for name in self.arrays}
        self.pages = Pages(sum(-(-size // 8) * 8 for size in sizes.values()))
        self.bytes = np.asarray(self.pages)
        at = self.bytes.size
        for name in self.arrays:
            at -= -(-sizes[name] // 8) * 8
            view = self.bytes[at : at + sizes[name]].view(dtypes[name]).reshape(shapes[name])
            view[...] = rng.random(shapes[name]) + 0.5
            setattr(self, name, view)
        self.pristine = self.bytes.tobytes()
        self.renew()

    def renew(self) -> None:
        self.bytes[...] = np.frombuffer(self.pristine, np.uint8)
        self.state = self.new_state()
        _, self.saved = cubn.forward_train(self.x, self.state, update=False)
        self.moments = cubn.moments(self.x)
        self.dict = self.state.to_dict()
        self.options = self.options_of(self.state)

    def new_state(self) -> Any:
        return cubn.BatchNormState.from_arrays(
            gamma=self.gamma, beta=self.beta, running_mean=self.running_mean, running_var=self.running_var
        )

    @staticmethod
    def options_of(state: Any) -> tuple[Any, ...]:
        counters = (np.asarray(counter).tobytes() for counter in (state.tracked, state.skipped))
        return state.eps, state.momentum, state.channel_axis, state.num_features, *counters

    def changed(self) -> bool:
        return self.bytes.tobytes() != self.pristine or self.options_of(self.state) != self.options


def _uses(w: World, state: Any) -> Iterator[Callable[[], Any]]:
    """Everything that reads a state, or writes it; x is of the state's channels where it is a small one."""
    features = state.num_features
    x = w.x if features == C else np.ones((3, features if features < 10 else C, 2), np.float32)
    yield lambda: cubn.forward_train(x, state)
    yield lambda: cubn.forward(x, state)
    yield lambda: cubn.forward_frozen(x, state)
    yield lambda: cubn.update(state, cubn.moments(x))
    yield lambda: cubn.fold(state)
    yield state.to_dict
    yield lambda: repr(state)
    yield lambda: copy.copy(state)
    yield lambda: pickle.dumps(state)


def use(w: World, state: Any, *, changed: bool = False) -> None:
    """Use a state for all it is good for; raise the first error there is."""
    errors: list[Exception] = []
    for each in _uses(w, state):
        try:
            each()
        except Exception as error:
            errors.append(error)
    if errors:
        strange = [error for error in errors if not isinstance(error, (TypeError, ValueError, AttributeError))]
        tracked = getattr(state, "tracked", None) is not None
        if strange or tracked:
            raise (strange or errors)[0]


@cache
def world() -> World:
    warnings.simplefilter("ignore", cubn.StateWarning)  # this part is about errors
    return World()
