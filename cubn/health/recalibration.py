"""Running statistics taken anew over a data set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

from cubn._arguments import as_int, flag
from cubn._moments import Moments
from cubn.errors import a_type, message, reporting_as
from cubn.health.recalibration_commit import Target, commit, of_state
from cubn.health.recalibration_passes import Observe, Options, Pools, Recalibration, Stage, Subject
from cubn.state import BatchNormState, checked_state
from cubn.typing import Comm


@overload
def recalibrate(states_or_model: BatchNormState, batches: Iterable[Any], **options: Any) -> Moments: ...


@overload
def recalibrate(
    states_or_model: Sequence[BatchNormState], batches: Iterable[Any], **options: Any
) -> list[Moments]: ...


@overload
def recalibrate(states_or_model: Any, batches: Iterable[Any], **options: Any) -> dict[str, Moments]: ...


@reporting_as("recalibrate")
def recalibrate(
    states_or_model: Any,
    batches: Iterable[Any],
    *,
    layerwise: bool | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    comm: Comm | None = None,
    start: int | None = None,
    checkpoint: Any = None,
    checkpoint_every: int = 50,
    progress: bool | None = None,
) -> Any:
    """TODO"""
    options = Options(comm, start, checkpoint, checkpoint_every, progress)
    recalibration = Recalibration(batches, options)

    def subject() -> Subject:
        _check(options)
        return _subject(states_or_model, batches, layerwise, forward)

    found, record = recalibration.run(subject)
    commit(found.targets, record.done, record.all_batches)
    recalibration.close()
    if isinstance(states_or_model, BatchNormState):
        return record.done[""]
    return list(record.done.values()) if isinstance(states_or_model, Sequence) else dict(record.done)


def _check(options: Options) -> None:
    if options.start is not None and as_int(options.start, "start") < 0:
        raise ValueError(message("start", "be 0 or more, a global sample index", options.start))
    if as_int(options.checkpoint_every, "checkpoint_every") < 1:
        raise ValueError(message("checkpoint_every", "be 1 or more batches", options.checkpoint_every))
    if options.progress is not None:
        flag(options.progress, "progress")


def _subject(states_or_model: Any, batches: Any, layerwise: bool | None, forward: Any) -> Subject:
    if not isinstance(batches, Iterable):
        raise TypeError(message("batches", "be iterable", a_type(batches)))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(states_or_model, torch.nn.Module):
        from cubn.torch._health.recalibration import Model

        layerwise = layerwise is None or flag(layerwise, "layerwise")
        if layerwise and iter(batches) is batches:
            remedy = "Give a list, a DataLoader or what else can be iterated again; or use layerwise=False."
            rule = "be iterable again for each layer of a model"
            raise TypeError(message("batches", rule, f"{a_type(batches)}, which ends after one pass", remedy))
        return Model(states_or_model, layerwise, forward)
    for name, value in (("layerwise", layerwise), ("forward", forward)):
        if value is not None:
            raise TypeError(message(name, "be left out for states, whose batches are given", value))
    return _States(states_or_model)


class _States:
    """States, whose inputs are the batches."""

    def __init__(self, states: Any) -> None:
        self._given = states
        named: dict[str, Any]
        if isinstance(states, Mapping):
            named = dict(states)
        elif isinstance(states, (list, tuple)):
            named = {f"state {i}": state for i, state in enumerate(states)}
        else:
            named = {"": states}
        if not named:
            raise ValueError(message("states_or_model", "hold a state", "none"))
        if not all(isinstance(state, BatchNormState) for state in named.values()):
            rule = "be a BatchNormState, a list or mapping of them, or a torch.nn.Module"
            got = a_type(next(state for state in named.values() if not isinstance(state, BatchNormState)))
            raise TypeError(message("states_or_model", rule, got))
        if len(set(map(id, named.values()))) < len(named):
            raise ValueError(message("states_or_model", "hold each state once", "one twice"))
        for state in named.values():
            checked_state(state)._check_updatable()
        self.targets: dict[str, Target] = {name: of_state(state) for name, state in named.items()}
        self.identity = {
            "kind": "states",
            "layers": {name: [state.num_features, state.channel_axis] for name, state in named.items()},
        }

    def digest(self) -> str:
        """Nothing but the batches."""
        return ""

    def stages(self, batches: Iterable[Any]) -> list[Stage]:
        return [tuple(self.targets)]

    @contextmanager
    def observing(self, stage: Stage, done: Mapping[str, Moments]) -> Iterator[Observe]:
        yield self._observe

    def _observe(self, batch: Any, pools: Pools) -> None:
        for name, x in self._arrays(batch).items():
            state = self.targets[name].state
            taken = pools.add(name, 0, x, channel_axis=state.channel_axis)
            if taken.num_features != state.num_features:
                rule = f"have {state.num_features} channels, as the state has"
                raise ValueError(message("a batch", rule, taken.num_features))

    def _arrays(self, batch: Any) -> dict[str, Any]:
        """By the names of the states."""
        given, names = self._given, list(self.targets)
        if isinstance(given, BatchNormState):
            return {"": batch}
        if isinstance(given, Mapping):
            if isinstance(batch, Mapping) and batch.keys() == given.keys():
                return dict(batch)
            got = f"the names {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else a_type(batch)
            raise ValueError(message("a batch", "be a mapping of the states' names to arrays", got))
        if isinstance(batch, (list, tuple)) and len(batch) == len(names):
            return dict(zip(names, batch, strict=True))
        got = f"{len(batch)}" if isinstance(batch, (list, tuple)) else a_type(batch)
        raise ValueError(message("a batch", f"be a list of {len(names)} arrays, one for each state", got))
