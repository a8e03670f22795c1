"""Running statistics watched while a network trains."""

from __future__ import annotations

import json
import logging
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from cubn._arguments import as_int
from cubn._state.arrays import _outside, channels
from cubn.errors import a_type, message, quoted, reporting_as
from cubn.health.diagnose import examine
from cubn.health.finding import SEVERITIES, Finding
from cubn.health.history import trends
from cubn.health.layer import layers_of
from cubn.health.records import History
from cubn.health.report import Report
from cubn.health.sources import Pending, source_of

LOG = logging.getLogger("cubn.health")

LEVELS = {"error": logging.ERROR, "warning": logging.WARNING}

UNDER_WAY = 4
"""Readings that a device may be at before the oldest is waited for."""

OnFinding = Literal["warn", "log"] | Callable[[Finding], object]


class HealthWarning(UserWarning):
    """What a `Monitor` found in running statistics."""


class Noticed(NamedTuple):
    """A finding, and the step at which the monitor made it."""

    step: int
    finding: Finding


class Monitor:
    """Watch the running statistics of a training, and tell what goes wrong before a validation shows it.

    Call `step` once in each training step, after the forward; or `attach` it to an optimiser of PyTorch. Each layer's
    gamma and running statistics are recorded, and what its batches were, which follows from two readings:
    batch = (new - (1 - w) * old) / w. Every few records the rules of `cubn.health.history` look at them.

    Parameters
    ----------
    subject : BatchNormState, list or mapping of them, or torch.nn.Module
        Of a model, all modules with running statistics, torch's own and cubn's.
    every : int
        Steps from a record to the next. With more than 1, what is recorded of the batches is their average since the
        last record.
    check : int
        Records between two looks of the rules.
    memory : int
        Bytes for the records, besides the newest 64. Once they are full, every second older one is dropped, and then
        every second new one, and so on: those that stay are evenly spaced over the training.
    on_finding : {"warn", "log"} or callable
        A `HealthWarning`; a line of the logger `cubn.health`; or a function of the `Finding`. Each rule is told once of
        each layer, and once more when a warning becomes an error; infos are in `findings` and `report` only.

    Attributes
    ----------
    history : History
        Records by layer: `history["layer1.0.bn1"].running_var` is of shape (T, C), `.steps` of shape (T,).
    findings : list of Noticed
        What was found, with the step.

    Raises
    ------
    TypeError, ValueError
        If subject has no running statistics, or an option does not fit.

    Notes
    -----
    A record of a model is one concatenation of its buffers. On a CUDA device that is queued behind the step, copied to
    pinned memory and looked at when it has arrived, one or a few steps later: no step waits for it. States of a device
    are waited for at each record: give those an `every` of 50, say.

    Not recorded are the inputs: what is known of a batch is what the update of the running statistics tells. Layers in
    eval mode, frozen ones, or a momentum of 0 tell nothing.

    Of several ranks with synchronised batch norms, one monitor is enough.

    Examples
    --------
    >>> import numpy as np, cubn, cubn.health
    >>> state, rng = cubn.BatchNormState(4), np.random.default_rng(0)
    >>> with cubn.health.Monitor(state, on_finding=lambda found: print(found.rule, found.channels)) as monitor:
    ...     for step in range(100):
    ...         x = rng.standard_normal((8, 4, 6, 6), dtype=np.float32)
    ...         x[:, 2] *= 0.8**step  # dies
    ...         _ = cubn.forward_train(x, state)
    ...         monitor.step()
    gain-growing (2,)
    variance-sinking (2,)
    >>> monitor.history["state"].running_var.shape
    (34, 4)
    """

    @reporting_as("Monitor")
    def __init__(
        self,
        subject: Any,
        *,
        every: int = 3,
        check: int = 3,
        memory: int = 1 << 25,
        on_finding: OnFinding = "warn",
    ) -> None:
        self.every, self.check, self.memory = (
            _positive(value, name) for name, value in (("every", every), ("check", check), ("memory", memory))
        )
        if on_finding not in ("warn", "log") and not callable(on_finding):
            raise TypeError(message("on_finding", "be 'warn', 'log' or a function", quoted(on_finding)))
        self._subject, self._source, self._on_finding = subject, source_of(subject), on_finding
        self.history = History(self._source.layers, self._source.dtype, self.memory)
        self.findings: list[Noticed] = []
        self._steps = 0
        self._under_way: deque[tuple[int, Pending]] = deque()
        self._installed: list[Any] = []

    def step(self) -> None:
        """One training step is done: record it, if it is one of those, and tell what is found.

        Warns
        -----
        HealthWarning
            With `on_finding="warn"`.
        """
        step, self._steps = self._steps, self._steps + 1
        if step % self.every == 0:
            self._under_way.append((step, self._source.read()))
        self._settle(waiting=len(self._under_way) > UNDER_WAY)

    def attach(self, optimizer: Any) -> Self:
        """Let an optimiser of PyTorch call `step` after each of its own. Returns the monitor.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
        """
        register = getattr(optimizer, "register_step_post_hook", None)
        if register is None:
            rule = "have register_step_post_hook, as those of torch.optim"
            raise TypeError(message("optimizer", rule, a_type(optimizer), function="attach"))
        self._installed.append(register(lambda *_: self.step()))
        return self

    def close(self) -> None:
        """Remove what `attach` installed, and look at the last records. What was recorded stays."""
        while self._installed:
            self._installed.pop().remove()
        self._settle(waiting=True)
        self._look()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:  # a warning that is an error would hide it
            while self._installed:
                self._installed.pop().remove()

    def report(self) -> Report:
        """What is wrong now: what the rules say of the layers as they are, and of how they came to be so.

        Returns
        -------
        Report
        """
        self._settle(waiting=True)
        layers = [
            replace(layer, skipped_lately=self.history[layer.name].skipped_lately)
            if self.history.records and layer.name in self.history and layer.skipped is not None
            else layer
            for layer in layers_of(self._subject)
        ]
        return Report(layers, [*examine(layers).findings, *trends(self.history)])

    def to_dict(self) -> dict[str, Any]:
        """Everything recorded and found, for a checkpoint: numbers, words and arrays, as `numpy.savez` takes them."""
        self._settle(waiting=True)
        findings = [(noticed.step, asdict(noticed.finding)) for noticed in self.findings]
        return {
            "steps": self._steps,
            "every": self.every,
            "check": self.check,
            "memory": self.memory,
            "names": np.array([layer.name for layer in self.history.layers]),
            "num_features": np.array([layer.num_features for layer in self.history.layers]),
            "findings": json.dumps(findings),
            **self.history.to_dict(),
        }

    @classmethod
    @reporting_as("from_dict")
    def from_dict(cls, d: Mapping[str, Any], subject: Any, *, on_finding: OnFinding = "warn") -> Self:
        """A monitor that goes on where another one's `to_dict` left off.

        Parameters
        ----------
        d : mapping
            As from `to_dict`, or from what stored it.
        subject : BatchNormState, list or mapping of them, or torch.nn.Module
            With the same layers.
        on_finding : {"warn", "log"} or callable
            What was told before is not told again.

        Raises
        ------
        ValueError
            If the layers are others.
        """
        options = {name: int(d[name]) for name in ("every", "check", "memory")}
        monitor = cls(subject, on_finding=on_finding, **options)
        recorded = dict(zip(map(str, d["names"]), map(int, d["num_features"]), strict=True))
        found = {layer.name: layer.num_features for layer in monitor.history.layers}
        if recorded != found:
            different = ", ".join(sorted({name for name, _ in recorded.items() ^ found.items()}))
            raise ValueError(message("subject", "have the layers that were recorded", f"others: {different}"))
        monitor.history.restore(d)
        monitor._steps = int(d["steps"])
        for step, finding in json.loads(str(d["findings"])):
            finding["channels"] = tuple(finding["channels"])
            monitor.findings.append(Noticed(step, Finding(**finding)))
        return monitor

    def __repr__(self) -> str:
        layers, told = len(self.history), len(self.findings)
        return f"Monitor(layers={layers}, steps={self._steps}, records={self.history.records}, findings={told})"

    def _settle(self, waiting: bool) -> None:
        """Record the readings that have arrived; with `waiting`, all of them."""
        while self._under_way and (waiting or self._under_way[0][1].ready()):
            step, reading = self._under_way.popleft()
            self.history.append(step, reading.result())
            if self.history.records % self.check == 0:
                self._look()

    def _look(self) -> None:
        """Tell what the rules find that was not told before."""
        told = {(noticed.finding.rule, noticed.finding.layer): noticed.finding.severity for noticed in self.findings}
        new = []
        for finding in trends(self.history):
            before = told.get((finding.rule, finding.layer))
            if before is None or SEVERITIES.index(finding.severity) < SEVERITIES.index(before):
                new.append(Noticed(int(self.history.steps[-1]), finding))
        self.findings += new
        for noticed in new:
            if noticed.finding.severity != "info":
                self._tell(*noticed)

    def _tell(self, step: int, finding: Finding) -> None:
        if callable(self._on_finding):
            self._on_finding(finding)
            return
        where = f"{finding.layer}, {channels([*finding.channels])}" if finding.channels else finding.layer
        text = (
            f"step {step}, {where}: {finding.message} [{finding.rule}]. Cause: {finding.cause}. Try: {finding.remedy}."
        )
        if self._on_finding == "log":
            LOG.log(LEVELS[finding.severity], text)
        else:
            warnings.warn(text, HealthWarning, stacklevel=_outside())


def _positive(value: int, argument: str) -> int:
    number = as_int(value, argument)
    if number < 1:
        raise ValueError(message(argument, "be at least 1", number))
    return number
