"""Which layer breaks validation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from cubn._arguments import on_host
from cubn._floating_point import default_floating_point
from cubn._moments import Moments
from cubn._state.arrays import described
from cubn.errors import a_type, message, reporting_as
from cubn.health.gap import LayerGap, Squares, TrainEvalGap, ranked, squares
from cubn.health.sources import states_of
from cubn.moments import moments
from cubn.state import BatchNormState


@default_floating_point
@reporting_as("train_eval_gap")
def train_eval_gap(
    subject: Any, batches: Iterable[Any], *, loss: Callable[[Any, Any], Any] | None = None, contributions: bool = True
) -> TrainEvalGap:
    """Find out which layers' outputs move between a batch's statistics and the running ones, and what comes of it.

    *Local*, for each layer: with the input that it has when all layers use the batch's statistics, the root mean square
    of y_running - y_batch over that of y_batch. *Alone*: how far the model's output moves when this layer alone uses
    its running statistics, and all others the batch's. *Remaining*: how far it is off when all layers but this one use
    their running statistics.

    Parameters
    ----------
    subject : torch.nn.Module, BatchNormState, or list or mapping of states
    batches : iterable
        A few batches. For a model: tensors; tuples or lists, of which the first is the model's input; or mappings of
        keyword arguments. For states: a mapping or list of inputs with one for each state, or the input of the only
        one.
    loss : function of output and target, optional
        For a model: then `alone`, `remaining` and `total` are differences of this loss, and not of the output. Batches
        are pairs of input and target. The mean over batches, each by its number of samples.
    contributions : bool
        For a model: whether `alone` and `remaining` are worked out. They take two runs of the model for each layer and
        batch; without them it is two runs in all.

    Returns
    -------
    TrainEvalGap
        `layers`, ranked; `total`. Printed, a table.

    Raises
    ------
    TypeError, ValueError
        If subject has no running statistics, or batches do not fit it.

    Notes
    -----
    All modules are in eval mode throughout, so dropout is no part of the gap; a batch norm that is to use the batch's
    statistics is lent them as running ones. What is fused into a batch norm, an addition or a ReLU, is no part of
    `local`. Frozen layers of `cubn.torch` are left out: they use running statistics in training too.

    A model is left as it was found, also after an exception: modes, buffers to the bit, hooks, and torch's random
    numbers; each run begins with the same ones.

    Examples
    --------
    >>> import numpy as np, cubn, cubn.health
    >>> x = np.random.default_rng(0).standard_normal((64, 3, 8, 8), dtype=np.float32)
    >>> good, bad = cubn.BatchNormState(3, momentum=1), cubn.BatchNormState(3)
    >>> for state in (good, bad):
    ...     _ = cubn.forward_train(x, state)
    >>> bad.running_var[1] = 1e-3
    >>> gap = cubn.health.train_eval_gap({"good": good, "bad": bad}, [{"good": x, "bad": x}])
    >>> [layer.name for layer in gap.layers], gap.layers[0].worst[0]
    (['bad', 'good'], 1)
    """
    batches = list(batches)
    if not batches:
        raise ValueError(message("batches", "hold at least one batch", "none"))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(subject, torch.nn.Module):
        from cubn.torch._health.gap import of_model

        return of_model(subject, batches, loss, contributions)
    if loss is not None:
        raise TypeError(message("loss", "be None for plain states", a_type(loss)))
    states = states_of(subject)
    inputs = [_inputs(states, batch) for batch in batches]
    gaps = [LayerGap.of(name, [_of_state(state, batch[name]) for batch in inputs]) for name, state in states.items()]
    return TrainEvalGap(ranked(gaps))


def _inputs(states: Mapping[str, BatchNormState], batch: Any) -> dict[str, Any]:
    """The input of each state."""
    if isinstance(batch, Mapping):
        given = {str(name): x for name, x in batch.items()}
    elif isinstance(batch, (list, tuple)):
        given = {str(i): x for i, x in enumerate(batch)}
    else:
        given = dict.fromkeys(states, batch) if len(states) == 1 else {}
    if given.keys() != states.keys():
        rule = f"have an input for each state, {', '.join(states)}"
        raise ValueError(message("batches", rule, ", ".join(given) or a_type(batch)))
    return given


def _of_state(state: BatchNormState, x: Any) -> tuple[float, Squares]:
    taken: Moments = moments(x, channel_axis=state.channel_axis)
    running = _numbers(state.running_mean, 0.0), _numbers(state.running_var, 1.0)
    own = taken.mean, taken.var()
    return float(taken.count), squares(own, running, _numbers(state.gamma, 1.0), _numbers(state.beta, 0.0), state.eps)


def _numbers(array: Any, default: float) -> Any:
    return default if array is None else on_host(described(array, "array")).astype(np.float64)
