"""The arrays of a valid call: as cubn gets them, and as the oracle does."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

import cubn
from tests import oracle
from tests.fuzz import producer
from tests.fuzz.cases import Case, sample_axis
from tests.fuzz.memory import Memory, Placed
from tests.ops import arrays


class Given:
    """A case's arrays: as stores for the oracle, and in memory of its own for cubn."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        self.C = case.shape[case.axis]
        values = dict(centre=case.centre, scale=case.scale, wild=case.wild)
        self.read: list[Placed] = []
        self.written: dict[str, Placed] = {}
        self.x = self._placed(arrays.normal(rng, case.shape, case.dtype, **values), case.x)
        self.dy = self._placed(arrays.normal(rng, case.shape, case.dtype, wild=case.wild), case.others)
        self.residual = None
        if case.residual:
            self.residual = self._placed(arrays.normal(rng, case.shape, case.dtype, **values), case.others)
        self.mask = self._mask(rng)
        self.parameters = {
            name: self._placed(arrays.normal(rng, self.C, case.parameters, centre=0.3, wild=case.wild), case.vectors)
            for name in case.affine
        }
        dtype = "float64" if case.dtype == "float64" else "float32"
        mean = arrays.normal(rng, self.C, dtype, centre=case.centre, wild=case.wild)
        var = np.abs(arrays.normal(rng, self.C, dtype, centre=2.0, wild=case.wild))
        self.running_mean, self.running_var = (Placed(v, case.vectors) for v in (mean, var))
        self.values = {  # as they are before anything is written over them
            "x": self.x.array.copy(),
            "dy": self.dy.array.copy(),
            "residual": None if self.residual is None else self.residual.array.copy(),
            "running_mean": mean,
            "running_var": var,
        }
        self.written |= {"running_mean": self.running_mean, "running_var": self.running_var}

    def _placed(self, values: Any, where: Memory) -> Placed:
        placed = Placed(values, where)
        self.read.append(placed)
        return placed

    def _mask(self, rng: np.random.Generator) -> Placed | None:
        shape, axis, kind = self.case.shape, self.case.axis % len(self.case.shape), self.case.mask
        if kind == "none":
            return None
        extents = [n for a, n in enumerate(shape) if a != axis]
        if kind == "samples":
            extents = [extents[0], *[1] * (len(extents) - 1)]
        if kind == "positions":
            extents = [1, *extents[1:]]
        present = rng.random(extents) < 0.7
        present.flat[:2] = True  # a channel needs two values
        if kind == "rank":
            present = np.expand_dims(present, axis)
        order = tuple(int(a) for a in rng.permutation(present.ndim))
        return self._placed(present, Memory(order, at_end=bool(rng.random() < 0.8)))

    def protect(self) -> None:
        for placed in self.read:
            if not any(placed is other for other in self.written.values()):
                placed.keep_from_writes()

    def destination(self, what: str) -> dict[str, Any]:
        """`out` as the case has it, for a y or (then `what` is "dx") a gradient."""
        out, case = self.case.out, self.case
        if out == "fresh" or (out == "in place" and what == "y" and case.repeats > 1):
            return {}
        if out == "given":
            placed = Placed(np.zeros(case.shape, self.x.array.dtype), case.others)
        elif out == "in place":
            placed = self.x if what == "y" else self.dy
        elif what == "y" and self.residual is not None and case.repeats == 1:
            placed = self.residual
        else:
            return {}
        self.written[what] = placed
        return {"out": placed}

    # --- what the oracle makes of them ---

    def ncs(self, name: str = "x") -> Any:
        value = self.values[name]
        return None if value is None else oracle.as_ncs(value, self.case.axis)

    def flat_mask(self) -> Any:
        if self.mask is None:
            return None
        mask, shape, axis = self.mask.array, self.case.shape, self.case.axis
        if self.case.mask == "rank":
            mask = np.squeeze(mask, axis % len(shape))
        return oracle.mask_as_ns(mask, shape, axis)

    def options(self) -> dict[str, Any]:
        given = {name: placed.array for name, placed in self.parameters.items()}
        return {**given, "mask": self.flat_mask(), "residual": self.ncs("residual"), "relu": self.case.relu}

    def statistics(self, start: int = 0) -> Any:
        if self.case.operation in ("forward", "frozen"):
            old = self.values["running_mean"], self.values["running_var"]
            return oracle.frozen_statistics(*old, self.case.eps)
        return oracle.batch_statistics(self.ncs(), self.case.eps, mask=self.flat_mask(), start=start)

    def output(self, statistics: Any) -> dict[str, Any]:
        return {"y": oracle.normalize(self.ncs(), statistics, **self.options())}

    def gradients(self, statistics: Any) -> dict[str, Any]:
        frozen = self.case.operation == "frozen"
        return self._wanted(oracle.backward(self.ncs("dy"), self.ncs(), statistics, frozen=frozen, **self.options()))

    def step(self, statistics: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """y and gradients of a training or frozen step, renormalised if the case says so."""
        case, given = self.case, self.options()
        if not case.limits:
            return self.output(statistics), self.gradients(statistics)
        old, parameters = (
            (self.values["running_mean"], self.values["running_var"]),
            (given.get("gamma"), given.get("beta")),
        )
        new = oracle.renormalised(statistics, *old, case.eps, case.limits, *parameters)
        options = given | {"gamma": new.gamma, "beta": new.beta}
        found = oracle.backward(self.ncs("dy"), self.ncs(), statistics, **options)
        with np.errstate(all="ignore"):
            sums = new.r * found.dgamma + new.d * found.dbeta, found.dbeta
        of = (np.float32 if p is None else p.dtype for p in parameters)
        found.dgamma, found.dbeta = (oracle.narrow(total, dtype) for total, dtype in zip(sums, of, strict=True))
        return {"y": oracle.normalize(self.ncs(), statistics, **options)}, self._wanted(found)

    def by_groups(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """y and gradients of ghost batches."""
        x, dy, case = self.ncs(), self.ncs("dy"), self.case
        y, found, _ = oracle.ghost_batches(x, dy, case.groups, case.eps, **self.options())
        return {"y": y}, self._wanted(found)

    def _wanted(self, found: Any) -> dict[str, Any]:
        wanted = {"dx": found.dx} | {f"d{name}": getattr(found, f"d{name}") for name in self.parameters}
        return wanted | ({"dresidual": found.dresidual} if self.case.residual else {})

    def folded(self) -> dict[str, Any]:
        """Computed in float64, and rounded once."""
        given = {name: oracle.widen(placed.array).astype(np.float64) for name, placed in self.parameters.items()}
        mean, var = (self.values[name].astype(np.float64) for name in ("running_mean", "running_var"))
        with np.errstate(all="ignore"):
            scale = given.get("gamma", 1.0) / np.sqrt(var + self.case.eps)
            folded = {"scale": scale, "shift": given.get("beta", 0.0) - mean * scale}
            return {name: value.astype(self.values["running_var"].dtype) for name, value in folded.items()}

    def updated(self, statistics: Any) -> dict[str, Any]:
        zeros = np.zeros(self.C, np.int64)
        after = oracle.State(self.values["running_mean"], self.values["running_var"], zeros, zeros)
        biased = {"biased": True} if self.case.biased else {}
        for _ in range(self.case.repeats):
            after = oracle.update(after, statistics, self.case.momentum, **biased)
        return {
            "running_mean": after.mean,
            "running_var": after.var,
            "tracked": after.tracked,
            "skipped": after.skipped,
        }

    # --- what cubn gets ---

    def state(self, copied: bool = False) -> Any:
        def carried(placed: Placed) -> Any:
            return carry(placed.array.copy() if copied else placed.array, self.case.library)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cubn.StateWarning)  # what is not finite is part of the campaign
            return cubn.BatchNormState.from_arrays(
                **{name: carried(placed) for name, placed in self.parameters.items()},
                running_mean=carried(self.running_mean),
                running_var=carried(self.running_var),
                eps=self.case.eps,
                momentum=self.case.momentum,
                channel_axis=self.case.axis,
                **({"running_variance": "biased"} if self.case.biased else {}),
            )

    def arguments(self, lo: int | None = None, hi: int | None = None) -> tuple[Any, dict[str, Any]]:
        """x and its options; of samples [lo, hi) where they are given."""
        part = slice(lo, hi)
        options: dict[str, Any] = {"relu": self.case.relu}
        if self.residual is not None:
            options["residual"] = self.carried(self.residual, part)
        if self.mask is not None:
            options["mask"] = self.carried_mask(part)
        return self.carried(self.x, part), options

    def carried(self, placed: Placed, part: slice = slice(None)) -> Any:
        axis = sample_axis(self.case.shape, self.case.axis)
        return carry(placed.array[(slice(None),) * axis + (part,)], self.case.library)

    def carried_mask(self, part: slice = slice(None)) -> Any:
        assert self.mask is not None
        mask, axis = self.mask.array, 0
        if self.case.mask == "rank":
            axis = sample_axis(self.case.shape, self.case.axis)
        if mask.shape[axis] > 1:
            mask = mask[(slice(None),) * axis + (part,)]
        return carry(mask, self.case.library)


def carry(store: Any, library: str) -> Any:
    """The store as an array of a library, in its own memory (JAX: in a copy)."""
    return producer.Foreign(store) if library == "foreign" else arrays.carry(store, library)


def store_of(array: Any) -> Any:
    return array.store if isinstance(array, producer.Foreign) else arrays.store_of(array)
