"""Running statistics taken anew over a data set."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cubn._arguments import as_int, flag
from cubn._moments import Moments
from cubn.errors import a_type, message, reporting_as
from cubn.health.recalibration.commit import Target, commit, of_state
from cubn.health.recalibration.passes import Observe, Options, Pools, Recalibration, Stage, Subject, bar_of
from cubn.state import BatchNormState
from cubn.typing import Comm


@reporting_as("recalibrate")
def recalibrate(
    states_or_model: Any,
    batches: Iterable[Any],
    *,
    layerwise: bool | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    comm: Comm | None = None,
    start: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool | None = None,
) -> Any:
    """Replace running statistics by those of a whole data set: running_mean = mean, running_var = the variance.

    Exact: Moments of the batches are merged, never averaged, so that batches of any size weigh what they hold; a last
    batch of one does no harm. The old statistics stay until the new ones are complete, and then all layers change or
    none.

    Parameters
    ----------
    states_or_model : BatchNormState, list or mapping of them, or torch.nn.Module
        Of a model, its batch norms with running statistics: torch's, cubn's, SyncBatchNorm, and those in
        `torch.optim.swa_utils.AveragedModel`.
    batches : iterable
        For one state, arrays of its inputs; for a list or mapping of states, lists or mappings of such arrays. For a
        model, batches for `forward`: a DataLoader or a list, say. A generator does where there is one pass.
    layerwise : bool, optional
        Of a model: whether layers are recalibrated one after the other, in the order in which they run, so that each is
        given what repaired layers make of the data: the inputs that it will have in eval mode. That is the default, and
        the result does not depend on the batches' sizes. With False, all are in one pass, in which a layer normalises
        each batch by its own statistics.
    forward : callable, optional
        `forward(model, batch)` calls the model. Without it, a mapping is given as keyword arguments, of a list or tuple
        the first element, and anything else as it is. Moving to a device is left to it, or to batches.
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or cubn.sync.Communicator, optional
        The ranks that hold the data in parts, each with its own batches, of any number. All of them get the same bits.
    start : int, optional
        Global index of this rank's first sample, where ranks hold contiguous ranges of the data in rank order. Then the
        bits are those of one process with all of it. Without it, parts are pooled in rank order, equal up to rounding.
    checkpoint : path, optional
        A file that keeps what was pooled, and is deleted at the end. Where it is there already, from an interrupted
        call with the same arguments, batches that it covers are read and left out. With `comm`, ".0", ".1" ... is
        appended for each rank.
    checkpoint_every : int
        After how many batches it is written; and always when an exception, Ctrl-C included, ends the call.
    progress : bool, optional
        Whether there is a progress bar, by tqdm. None: in a terminal, if tqdm is installed.

    Returns
    -------
    Moments, list of Moments, or dict of str to Moments
        What was pooled: of the state, of each state, or of each layer by its path in the model. A layer that no forward
        came to is not in it, and stays as it was.

    Raises
    ------
    TypeError
        If an argument does not fit; if batches cannot be iterated again and that is needed; if running statistics are
        of 16 bits.
    ValueError
        If there are no batches or fewer than two values per channel; if statistics are not finite; if, layer by layer,
        a batch has calls of a layer that the first one does not have; if a checkpoint is of something else.
    CollectiveMismatch
        With `comm`: if ranks differ in what they do, or one of them failed. Nothing was changed on any.
    ImportError
        With `progress=True`, if there is no tqdm.

    Notes
    -----
    running_var is what the state's `running_variance` says; of models, the unbiased one. `tracked` (of modules,
    `num_batches_tracked`) becomes the number of batches, of all ranks, and `skipped` 0: with `momentum=None` the next
    batch weighs as one more of these. Everything else is as before, also after an exception: gamma, beta, momentum, the
    mode of each module, hooks, random numbers.

    A model computes in eval mode meanwhile, without dropout and without gradients, and what torch.compile made of it
    runs eagerly, in all threads of the process. Layer by layer, L layers take a forward of the first batch and L passes
    over the batches, each of which ends a forward at its layer: about (L + 1) / 2 times the forwards of one pass, and L
    times the loading. Every pass begins with the same random numbers of torch, so a loader that shuffles by them gives
    the same batches. A batch norm that runs several times in a forward gets the statistics of all its inputs; it, and
    those after it, then normalise each batch by its own statistics in its pass. A batch with one value per channel is
    normalised by what was pooled before.

    What is exact of a model is the pooling: its convolutions may give other bits for other batch sizes.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.random.default_rng(0).normal(5, 2, (100, 3)).astype(np.float32)
    >>> state = cubn.BatchNormState(3)
    >>> cubn.recalibrate(state, [x[:64], x[64:99], x[99:]])
    Moments(samples=[0, 100), num_features=3, count=100)
    >>> bool((state.running_mean == cubn.moments(x).mean.astype(np.float32)).all()), state.tracked.tolist()
    (True, [3, 3, 3])
    """
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
    return list(record.done.values()) if isinstance(states_or_model, (list, tuple)) else dict(record.done)


def _check(options: Options) -> None:
    if options.start is not None and as_int(options.start, "start") < 0:
        raise ValueError(message("start", "be 0 or more, a global sample index", options.start))
    if as_int(options.checkpoint_every, "checkpoint_every") < 1:
        raise ValueError(message("checkpoint_every", "be 1 or more batches", options.checkpoint_every))
    if options.progress is not None and flag(options.progress, "progress"):
        bar_of(progress=True)  # where all ranks hear that there is none


def _subject(states_or_model: Any, batches: Any, layerwise: bool | None, forward: Any) -> Subject:
    if not isinstance(batches, Iterable):
        raise TypeError(message("batches", "be iterable", a_type(batches)))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(states_or_model, torch.nn.Module):
        from cubn.torch._health.recalibration import Model

        layerwise = layerwise is None or flag(layerwise, "layerwise")
        if layerwise and isinstance(batches, Iterator):  # not by iter(), for which loaders draw random numbers
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
        if not all(isinstance(name, str) for name in named):
            raise TypeError(message("states_or_model", "have names that are str", list(named)))
        if len(set(map(id, named.values()))) < len(named):
            raise ValueError(message("states_or_model", "hold each state once", "one twice"))
        for state in named.values():
            state._check_updatable()
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
            pools.add(name, 0, x, state.num_features, channel_axis=state.channel_axis)

    def _arrays(self, batch: Any) -> dict[str, Any]:
        """By the names of the states."""
        given, names = self._given, list(self.targets)
        if isinstance(given, BatchNormState):
            return {"": batch}
        if isinstance(given, Mapping):
            if isinstance(batch, Mapping) and batch.keys() == given.keys():
                return {name: batch[name] for name in names}
            got = f"the names {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else a_type(batch)
            raise ValueError(message("a batch", "be a mapping of the states' names to arrays", got))
        if isinstance(batch, (list, tuple)) and len(batch) == len(names):
            return dict(zip(names, batch, strict=True))
        got = f"{len(batch)}" if isinstance(batch, (list, tuple)) else a_type(batch)
        raise ValueError(message("a batch", f"be a list of {len(names)} arrays, one for each state", got))
