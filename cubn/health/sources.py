"""Where a monitor reads: states, and what each of their channels is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from cubn._arguments import on_host
from cubn._state.arrays import described
from cubn.errors import a_type, message
from cubn.health.reading import Reading, Watched
from cubn.state import BatchNormState


class Source(Protocol):
    """All layers of one training."""

    layers: tuple[Watched, ...]
    dtype: np.dtype[Any]
    """In which readings lose nothing, but for gammas of float64 beside running statistics of float32."""

    def read(self) -> Pending:
        """Begin to read all layers as they are now."""


class Pending(Protocol):
    """A reading that a device may still be at."""

    def ready(self) -> bool:
        """Whether `result` waits for nothing."""

    def result(self) -> Reading: ...


class Done:
    """A reading that is there."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def ready(self) -> bool:
        return True

    def result(self) -> Reading:
        return self._reading


class StateSource:
    """States of any library. Those on a device are waited for."""

    def __init__(self, states: Mapping[str, BatchNormState]) -> None:
        self._states = states
        self.layers = tuple(Watched(name, state.num_features, state.eps) for name, state in states.items())
        types = {described(state.running_mean, "running_mean").dtype for state in states.values()}
        self.dtype = np.dtype(np.float64 if "float64" in types else np.float32)

    def read(self) -> Done:
        values, counts, momentum = zip(*map(self._read, self._states.values()), strict=True)
        return Done(Reading(np.concatenate(values, axis=1), np.concatenate(counts, axis=1), np.concatenate(momentum)))

    def _read(self, state: BatchNormState) -> tuple[Any, Any, Any]:
        features = state.num_features
        values, counts = np.ones((3, features), self.dtype), np.empty((2, features), np.int64)
        with state._turn():
            counted = state._counts()
            for row, name in zip(values, ("gamma", "running_mean", "running_var"), strict=True):
                array = state._arrays[name]
                if array is not None:
                    row[:] = on_host(described(array, name))
        counts[:] = counted["tracked"], counted["skipped"]
        return values, counts, np.full(features, np.nan if state.momentum is None else state.momentum)


def source_of(subject: Any) -> Source:
    """What a monitor reads of a state, several, or a model of PyTorch."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(subject, torch.nn.Module):
        from cubn.torch._health.sources import ModuleSource

        return ModuleSource(subject)
    return StateSource(states_of(subject))


def states_of(subject: Any) -> dict[str, BatchNormState]:
    """States with running statistics by name: keys of a mapping, positions in a list, "state" for one."""
    if isinstance(subject, Mapping):
        states = {str(name): state for name, state in subject.items()}
    elif isinstance(subject, (list, tuple)):
        states = {str(i): state for i, state in enumerate(subject)}
    else:
        states = {"state": subject}
    for state in states.values():
        if not isinstance(state, BatchNormState):
            rule = "be a BatchNormState, a list or mapping of them, or a torch.nn.Module"
            raise TypeError(message("subject", rule, a_type(state)))
    tracked = {name: state for name, state in states.items() if state.running_mean is not None}
    if not tracked:
        raise ValueError(message("subject", "have running statistics", "none", "Make states with track=True."))
    return tracked
