"""Valid calls of each operation, and what the oracle makes of the same."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import cubn
from cubn.sync import threads
from tests import oracle
from tests.fuzz.cases import Case, sample_axis
from tests.fuzz.given import Given, carry
from tests.fuzz.memory import Placed

Perform = Callable[[], dict[str, Any]]


def prepared(given: Given) -> tuple[Perform, Callable[[], dict[str, Any]]]:
    """What calls cubn, and what then asks the oracle for the same."""
    return {
        "forward": _forward,
        "train": _train,
        "frozen": _train,
        "normalize": _normalize,
        "ranks": _ranks,
    }[given.case.operation](given)


def _outs(given: Given, what: str, x: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`out` among the options, as the very object that x, dy or residual is where it is in place."""
    destination = given.destination(what)
    if not destination:
        return {}
    placed = destination["out"]
    if placed is given.x or placed is given.dy:
        return {"out": x}
    return {"out": options["residual"] if placed is given.residual else given.carried(placed)}


def _forward(given: Given) -> Any:
    x, options = given.arguments()
    state = given.state()
    options |= _outs(given, "y", x, options)
    given.protect()

    def perform() -> dict[str, Any]:
        scale, shift = _fold(state)
        return {"y": cubn.forward(x, state, **options), "scale": scale, "shift": shift}

    return perform, lambda: given.output(given.statistics()) | given.folded()


def _fold(state: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cubn.StateWarning)
        return cubn.fold(state)


def _train(given: Given) -> Any:
    """A forward that knows a backward, and that."""
    trains, case = given.case.operation == "train", given.case
    x, options = given.arguments()
    dy = given.carried(given.dy)
    state = given.state()
    options |= _outs(given, "y", x, options)
    gradient = _outs(given, "dx", dy, options)
    given.protect()
    goes_back = options.get("out") is not x
    options |= {"groups": case.groups} if case.groups else {"renorm": case.limits} if case.limits else {}

    def perform() -> dict[str, Any]:
        for _ in range(case.repeats):
            y, saved = (cubn.forward_train if trains else cubn.forward_frozen)(x, state, **options)
        found = {"y": y, "running_mean": state.running_mean, "running_var": state.running_var}
        if trains:
            found |= {"tracked": state.tracked, "skipped": state.skipped}
        restated = _restated(given, dy, x, saved) if goes_back and case.restated else {}
        return found | (_backward(given, dy, saved, gradient) if goes_back else {}) | restated

    def expected() -> dict[str, Any]:
        statistics = given.statistics()
        kept = {name: given.values[name] for name in ("running_mean", "running_var")}
        output, gradients = given.by_groups() if case.groups else given.step(statistics)
        found = output | (given.updated(statistics) if trains else kept)
        gradients = gradients if goes_back else {}
        again = {f"{name} again": value for name, value in gradients.items() if goes_back and case.restated}
        return found | gradients | again

    return perform, expected


def _backward(given: Given, dy: Any, saved: Any, options: dict[str, Any]) -> dict[str, Any]:
    gradients = cubn.backward(dy, saved, **options)
    found = {f"d{name}": getattr(gradients, f"d{name}") for name in given.parameters}
    found |= {"dresidual": gradients.dresidual} if given.case.residual else {}
    return found | {"dx": gradients.dx}


def _restated(given: Given, dy: Any, x: Any, saved: Any) -> dict[str, Any]:
    """The same gradients by backward_from."""
    case = given.case
    gradients = cubn.backward_from(
        dy,
        x,
        mean=saved.mean,
        invstd=saved.invstd,
        **{name: carry(placed.array, case.library) for name, placed in given.parameters.items()},
        mask=None if given.mask is None else given.carried_mask(),
        relu=case.relu,
        frozen=case.operation == "frozen",
        channel_axis=case.axis,
        **({} if case.operation == "frozen" else {"count": int(saved.count)}),
    )
    return {f"d{name} again": getattr(gradients, f"d{name}") for name in ("x", *given.parameters)}


def _edges(case: Case) -> list[tuple[int, int]]:
    N = case.shape[sample_axis(case.shape, case.axis)]
    return list(itertools.pairwise([0, *case.cut, N]))


def _normalize(given: Given) -> Any:
    """By moments of parts, merged in an order of their own; and an update by them."""
    case = given.case
    rng = random.Random(case.seed)
    parts = []
    for lo, hi in _edges(case):
        x, options = given.arguments(lo, hi)
        parts.append((x, {"mask": options["mask"]} if "mask" in options else {}, case.start + lo))
    x, options = given.arguments()
    parameters = {name: carry(placed.array, case.library) for name, placed in given.parameters.items()}
    options |= _outs(given, "y", x, options)
    state = given.state()
    given.protect()

    def perform() -> dict[str, Any]:
        found = [cubn.moments(x, channel_axis=case.axis, start=start, **mask) for x, mask, start in parts]
        while len(found) > 1:
            i = rng.randrange(len(found) - 1)
            a, b = found[i : i + 2]
            found[i : i + 2] = [a.merge(b) if rng.random() < 0.5 else b.merge(a)]
        (moments,) = found
        y = cubn.normalize(x, moments, **parameters, eps=case.eps, channel_axis=case.axis, **options)
        cubn.update(state, moments)
        moved = {name: getattr(state, name) for name in ("running_mean", "running_var", "tracked", "skipped")}
        return {"y": y, "count": moments.count, "mean": moments.mean, "m2": moments.m2} | moved

    def expected() -> dict[str, Any]:
        statistics = given.statistics(case.start)
        of_moments = {"count": statistics.count, "mean": statistics.mean, "m2": statistics.m2}
        return given.output(statistics) | of_moments | given.updated(statistics)

    return perform, expected


def _ranks(given: Given) -> Any:
    """A training step over ranks that are threads; each has a part of the samples, and a state of its own."""
    case = given.case
    ranges = _edges(case)
    states = [given.state(copied=True) for _ in ranges]
    calls = []
    for lo, hi in ranges:
        x, options = given.arguments(lo, hi)
        if case.out == "given":
            options["out"] = given.carried(
                Placed(np.zeros(case.shape, given.x.array.dtype), case.others), slice(lo, hi)
            )
        calls.append((x, options, given.carried(given.dy, slice(lo, hi))))
    given.protect()
    declared = {"sizes": [hi - lo for lo, hi in ranges]} if case.sizes else {}

    def body(comm: Any) -> Any:
        x, options, dy = calls[comm.rank]
        y, saved = cubn.forward_train(x, states[comm.rank], comm=comm, **declared, **options)
        return y, cubn.backward(dy, saved, parameter_gradients=case.gradients)

    def perform() -> dict[str, Any]:
        results = threads.run(len(ranges), body)
        whole: dict[str, Any] = {"y": [y for y, _ in results], "dx": [g.dx for _, g in results]}
        if case.residual:
            whole["dresidual"] = [g.dresidual for _, g in results]
        for rank, (_, gradients) in enumerate(results):
            whole |= {f"d{name} of rank {rank}": getattr(gradients, f"d{name}") for name in given.parameters}
            for name in ("running_mean", "running_var", "tracked", "skipped"):
                whole[f"{name} of rank {rank}"] = getattr(states[rank], name)
        return whole

    def expected() -> dict[str, Any]:
        statistics = given.statistics()
        found = given.output(statistics) | given.gradients(statistics)
        everywhere = {name: found.pop(name) for name in list(found) if name in ("dgamma", "dbeta")}
        for rank, (lo, hi) in enumerate(ranges):
            found |= {f"{name} of rank {rank}": value for name, value in given.updated(statistics).items()}
            own = everywhere if case.gradients == "global" else _own_sums(given, statistics, lo, hi)
            found |= {f"{name} of rank {rank}": own[name] for name in everywhere}
        return found

    return perform, expected


def _own_sums(given: Given, statistics: Any, lo: int, hi: int) -> dict[str, Any]:
    options = given.options()
    for name in ("mask", "residual"):
        options[name] = None if options[name] is None else options[name][lo:hi]
    found = oracle.backward(given.ncs("dy")[lo:hi], given.ncs()[lo:hi], statistics, start=lo, **options)
    return {"dgamma": found.dgamma, "dbeta": found.dbeta}
