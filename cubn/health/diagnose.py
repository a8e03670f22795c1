"""What is wrong with batch norms: every rule asked about every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cubn._floating_point import default_floating_point
from cubn._moments import Moments
from cubn.errors import a_type, message, quoted, reporting_as
from cubn.health.layer import Layer, layers_of
from cubn.health.report import Report
from cubn.health.rules import RULES, Network
from cubn.typing import Comm


@default_floating_point
@reporting_as("diagnose")
def diagnose(
    subject: Any, moments: Moments | Mapping[str, Moments] | None = None, *, comm: Comm | None = None
) -> Report:
    """What is wrong with batch norms: their parameters, running statistics, counters and options.

    Every layer is seen by every rule of `docs/health.md`. Nothing is changed.

    Parameters
    ----------
    subject : BatchNormState, torch.nn.Module, flax.nnx.Module, list or mapping
        A state, a model, or several; a mapping is of names to any of these, a state_dict of PyTorch, Flax's variables,
        or what a state's `to_dict` gave.
    moments : Moments, or mapping of str to Moments, optional
        Of the inputs of the layer, or of layers by their names: running statistics far from them are `stale`.
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or cubn.sync.Communicator, optional
        Ranks that should hold the same; all of them call this, and each gets the report on its own layers, with what
        differs on the others.

    Returns
    -------
    Report
        `print(report)` shows a table; `findings`, `to_json()` and `to_html(path)` the rest.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message says what is asked for.
    CollectiveMismatch
        With `comm`, on all ranks: if they do not do the same thing, or another one failed.

    Notes
    -----
    Arrays on a device are copied to the host. With `comm`, ranks that agree exchange 128 bytes each.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> state = cubn.BatchNormState(4)
    >>> for seed in range(100):
    ...     x = np.random.default_rng(seed).standard_normal((32, 4), dtype=np.float32)
    ...     _ = cubn.forward_train(x, state)
    >>> cubn.diagnose(state)
    Report(layers=1, error=0, warning=0, info=0)
    >>> state.running_mean[2] = np.nan
    >>> (finding,) = cubn.diagnose(state).findings
    >>> finding.rule, finding.severity, finding.channels
    ('non-finite', 'error', (2,))
    """

    def make() -> list[Layer]:
        return _with_moments(layers_of(subject), moments)

    if comm is None:
        return examine(make())
    from cubn.health.comparing import compared

    return examine(compared(make, comm))


@default_floating_point
def examine(layers: Sequence[Layer]) -> Report:
    """Ask every rule about every layer.

    Parameters
    ----------
    layers : sequence of Layer

    Returns
    -------
    Report
    """
    network = Network(layers)
    with np.errstate(all="ignore"):
        found = [
            finding
            for layer in layers
            if layer.num_features
            for findings in RULES.values()
            for finding in findings(layer, network)
        ]
    return Report(layers, found)


def _with_moments(layers: list[Layer], moments: Any) -> list[Layer]:
    """Layers with the Moments of their inputs: of the only one, or by their names."""
    if moments is None:
        return layers
    if isinstance(moments, Moments):
        if len(layers) != 1:
            rule = f"be a mapping of names to Moments, for the subject has {len(layers)} batch norms"
            raise ValueError(message("moments", rule, "Moments"))
        moments = {layers[0].name: moments}
    if not isinstance(moments, Mapping):
        raise TypeError(message("moments", "be Moments, or a mapping of names to Moments", a_type(moments)))
    by_name = {layer.name: layer for layer in layers}
    for name, each in moments.items():
        if not isinstance(each, Moments):
            raise TypeError(message(f"moments[{quoted(name)}]", "be Moments", a_type(each), "cubn.moments takes them."))
        if name not in by_name:
            rule = f"be by the names of batch norms, as {quoted(', '.join(by_name))}"
            raise ValueError(message("moments", rule, quoted(name)))
        if each.num_features != by_name[name].num_features:
            rule = f"have {by_name[name].num_features} channels, as the layer has"
            raise ValueError(message(f"moments[{quoted(name)}]", rule, each.num_features))
    return [replace(layer, moments=moments.get(layer.name, layer.moments)) for layer in layers]
