"""The backend protocol on CUDA: choose a plan, add the addresses, launch. Nothing here waits for the device."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from cubn._tree import aligned_blocks
from cubn.backends import BackendArray, Extents, Gate, Nodes, Operand, Statistics, Vector
from cubn.backends.cuda import plan
from cubn.backends.cuda.device import Device
from cubn.backends.cuda.parameters import Fields, of_operand, of_scattered, of_vector, pack
from cubn.backends.cuda.plan import ITEMSIZE, Launch

Sums = tuple[BackendArray, BackendArray]


class Bits(NamedTuple):
    """Which y passed a residual ReLU: bit (n, c, p) at `first` and the sum of its index times `steps`."""

    memory: BackendArray
    kind: str  # of the order: "rows" is (n, c, p), "channels" is (n, p, c)
    first: int
    steps: tuple[int, int, int]


class Rows(NamedTuple):
    """Rows of nodes: int64 (rows,) and twice float64 (rows, C)."""

    count: BackendArray
    first: BackendArray
    second: BackendArray


class CudaBackend:
    """See cubn.backends.Backend."""

    name = "cuda"

    def __init__(self, device: Device) -> None:
        self.device = device

    # --- arrays -------------------------------------------------------------------------------------------------------

    def to_host(self, array: BackendArray) -> Any:
        return self.device.to_host(array)

    def from_host(self, array: Any) -> BackendArray:
        return self.device.from_host(array)

    def keep(self, parameter: Vector, C: int) -> tuple[BackendArray, Vector]:
        """Widened to float64, which holds every format exactly."""
        values = self.device.empty((C,), "float64")
        self._channelwise("widen", C, {**of_vector("gamma", parameter), "first": self._at(values)})
        return values, Vector(self._at(values), "float64", 1)

    # --- statistics ---------------------------------------------------------------------------------------------------

    def moments(self, extents: Extents, x: Operand, mask: Operand | None, start: int) -> Nodes:
        return self._nodes("Moments", extents, x, None, mask, Gate("none"), {}, start)

    def statistics(self, count: Any, mean: Any, m2: Any, eps: float) -> Statistics:
        found = self._new_statistics(len(mean))._replace(count=count)
        self._channelwise(
            "statistics",
            len(mean),
            {**self._statistics_fields(found), "first": self._at(mean), "second": self._at(m2), "eps": eps},
        )
        return found

    def frozen_statistics(self, running_mean: Vector, running_var: Vector, C: int, eps: float) -> Statistics:
        found = self._new_statistics(C)
        running = {**of_vector("old_mean", running_mean), **of_vector("old_var", running_var), "eps": eps}
        self._channelwise("frozen", C, {**self._statistics_fields(found), **running})
        return found

    def update(
        self,
        statistics: Statistics,
        old: tuple[Vector, Vector],
        new: tuple[Vector, Vector],
        tracked: BackendArray,
        skipped: BackendArray,
        momentum: float | None,
    ) -> None:
        fields = {
            **self._statistics_fields(statistics),
            **of_vector("old_mean", old[0]),
            **of_vector("old_var", old[1]),
            **of_vector("new_mean", new[0]),
            **of_vector("new_var", new[1]),
            "tracked": self._at(tracked),
            "skipped": self._at(skipped),
            "momentum": momentum or 0.0,
            "cumulative": int(momentum is None),
        }
        self._channelwise("update", len(tracked), fields)

    # --- forward ------------------------------------------------------------------------------------------------------

    def train(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        eps: float,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
        keep_bits: bool,
    ) -> tuple[Statistics, Bits | None]:
        found = self._new_statistics(extents.C)
        fields = {
            **self._statistics_fields(found),
            **of_vector("gamma", gamma),
            **of_vector("beta", beta),
            "eps": eps,
        }
        operands = _present(x=x, g=residual, y=y)
        options = _normalize_options(residual, relu, keep_bits)
        slab = mask is None and plan.slab(extents, operands, 1, options, keep_bits, self.device.limits)
        if slab:
            bits = self._new_bits(extents, "rows") if keep_bits else None
            self._resident(slab, extents, operands, bits, fields)
            return found, bits
        coefficients = self._new_coefficients(extents.C, x.dtype)
        rows = self._reduce("Moments", extents, x, None, mask, Gate("none"), {})
        self._finish("Moments", extents, rows, x.dtype, {**fields, "coefficients": self._at(coefficients)})
        return found, self._normalize(extents, x, y, coefficients, mask, residual, relu, keep_bits)

    def normalize(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        statistics: Statistics,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
        keep_bits: bool,
    ) -> Bits | None:
        coefficients = self._coefficients(extents.C, x.dtype, statistics, gamma, beta)
        return self._normalize(extents, x, y, coefficients, mask, residual, relu, keep_bits)

    def forward(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        running_mean: Vector,
        running_var: Vector,
        eps: float,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
    ) -> None:
        coefficients = self._new_coefficients(extents.C, x.dtype)
        fields = {
            **of_vector("old_mean", running_mean),
            **of_vector("old_var", running_var),
            **of_vector("gamma", gamma),
            **of_vector("beta", beta),
            "eps": eps,
            "coefficients": self._at(coefficients),
        }
        self._channelwise("frozen", extents.C, fields, x.dtype)
        self._normalize(extents, x, y, coefficients, mask, residual, relu, False)

    def _normalize(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        coefficients: BackendArray,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
        keep_bits: bool,
    ) -> Bits | None:
        if 0 in extents:
            return None
        operands = _present(x=x, g=residual, y=y)
        kind = _elementwise_kind(extents, operands, mask)
        bits = self._new_bits(extents, kind) if keep_bits else None
        options = _normalize_options(residual, relu, keep_bits)
        self._elementwise(extents, kind, operands, mask, options, bits, coefficients)
        return bits

    # --- backward -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        extents: Extents,
        dy: Operand,
        x: Operand,
        dx: Operand,
        dresidual: Operand | None,
        statistics: Statistics,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        frozen: bool,
        mask: Operand | None,
        gate: Gate,
    ) -> Sums:
        sums = first, second = tuple(self._parts(extents.C, extents.C))
        fields = {
            **self._statistics_fields(statistics),
            "first": self._at(first),
            "second": self._at(second),
        }
        operands = _present(x=x, g=dy, y=dx, r=dresidual)
        if mask is None and (gate.bits is None or gate.bits.kind == "rows"):
            options = _gradient_options(dresidual, gate, frozen)
            slab = plan.slab(extents, operands, 2, options, False, self.device.limits)
            if slab:
                parameters = {**of_vector("gamma", gamma), **of_vector("beta", beta)}
                self._resident(slab, extents, operands, gate.bits, {**fields, **parameters})
                return sums
        coefficients = self._coefficients(extents.C, x.dtype, statistics, gamma, beta)
        fields["coefficients"] = self._at(coefficients)
        rows = self._reduce("Sums", extents, x, dy, mask, gate, fields)
        self._finish("Sums", extents, rows, x.dtype, fields)
        self._input_gradient(extents, dy, x, dx, dresidual, coefficients, frozen, mask, gate)
        return sums

    def backward_sums(
        self,
        extents: Extents,
        dy: Operand,
        x: Operand,
        statistics: Statistics,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        mask: Operand | None,
        gate: Gate,
        start: int,
    ) -> Nodes:
        coefficients = self._coefficients(extents.C, x.dtype, statistics, gamma, beta)
        return self._nodes("Sums", extents, x, dy, mask, gate, {"coefficients": self._at(coefficients)}, start)

    def backward_apply(
        self,
        extents: Extents,
        dy: Operand,
        x: Operand,
        dx: Operand,
        dresidual: Operand | None,
        statistics: Statistics,
        gamma: Vector | None,
        beta: Vector | None,
        sums: Sums | None,
        *,
        mask: Operand | None,
        gate: Gate,
    ) -> None:
        coefficients = self._coefficients(extents.C, x.dtype, statistics, gamma, beta)
        if sums is not None:
            first, second = sums
            fields = {
                **self._statistics_fields(statistics),
                "coefficients": self._at(coefficients),
                "first": self._at(first),
                "second": self._at(second),
            }
            self._channelwise("gradient_coefficients", extents.C, fields, x.dtype)
        self._input_gradient(extents, dy, x, dx, dresidual, coefficients, sums is None, mask, gate)

    def _input_gradient(
        self,
        extents: Extents,
        dy: Operand,
        x: Operand,
        dx: Operand,
        dresidual: Operand | None,
        coefficients: BackendArray,
        frozen: bool,
        mask: Operand | None,
        gate: Gate,
    ) -> None:
        if 0 in extents:
            return
        operands = _present(x=x, g=dy, y=dx, r=dresidual)
        kind = _elementwise_kind(extents, operands, mask)
        if gate.bits is not None and gate.bits.kind != kind:
            kind = "strided"
        options = _gradient_options(dresidual, gate, frozen)
        self._elementwise(extents, kind, operands, mask, options, gate.bits, coefficients)

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        first, second = sums
        fields = {
            **self._statistics_fields(statistics),
            **of_vector("gamma", dgamma),
            **of_vector("beta", dbeta),
            "first": self._at(first),
            "second": self._at(second),
        }
        self._channelwise("parameter_gradients", len(first), fields)

    # --- the tree -----------------------------------------------------------------------------------------------------

    def _reduce(
        self,
        what: str,
        extents: Extents,
        x: Operand,
        dy: Operand | None,
        mask: Operand | None,
        gate: Gate,
        fields: Fields,
    ) -> Rows:
        """Rows of nodes of a batch, whose tree begins at its first sample; few enough for `finish`."""
        N, C, S = extents
        if not N * S:
            return Rows(self.device.zeros((1,), "int64"), *(self.device.zeros((1, C), "float64") for _ in range(2)))
        operands = _present(x=x, g=dy)
        kind = "strided" if mask is not None else plan.kind_of(extents, tuple(operands.values()))
        if gate.bits is not None and gate.bits.kind != kind:
            kind = "strided"
        vector = plan.vector_of(extents, tuple(operands.values()))
        cut = plan.reduction(extents, kind, what, gate.kind, x.dtype, vector, self.device.limits)
        rows = self._new_rows(cut.rows, C)
        given = {**_operand_fields(cut.reduce, operands, mask), **self._bits_fields(gate.bits), **fields}
        self._launch(cut.reduce, {**given, **self._rows_fields("node", rows)})
        for merge, left in cut.merges:
            rows = self._merge(merge, rows, left)
        return rows

    def _merge(self, merge: Launch, rows: Rows, left: int) -> Rows:
        C = rows.first.shape[1]
        merged = self._new_rows(left, C)
        self._launch(merge, {**self._rows_fields("from", rows), **self._rows_fields("node", merged)})
        return merged

    def _finish(self, what: str, extents: Extents, rows: Rows, dtype: str, fields: Fields) -> None:
        last = plan.finish(extents.C, what, len(rows.count), dtype)
        self._launch(last, {**self._rows_fields("from", rows), **fields})

    def _nodes(
        self,
        what: str,
        extents: Extents,
        x: Operand,
        dy: Operand | None,
        mask: Operand | None,
        gate: Gate,
        fields: Fields,
        start: int,
    ) -> Nodes:
        """One node for each maximal aligned block of samples: each is a batch of its own. In NumPy."""
        N, C, S = extents
        blocks = aligned_blocks(start, start + N) if S else ()
        found = []
        for lo, hi in blocks:
            at = lo - start
            part = [
                o and o._replace(pointer=o.pointer + at * o.sample_stride * ITEMSIZE[o.dtype]) for o in (x, dy, mask)
            ]
            bits = gate.bits and gate.bits._replace(first=gate.bits.first + at * gate.bits.steps[0])
            rows = self._reduce(
                what, extents._replace(N=hi - lo), part[0] or x, part[1], part[2], gate._replace(bits=bits), fields
            )
            count = len(rows.count)
            if count > 1:
                rows = self._merge(plan.merge_rows(C, what, count, count), rows, 1)
            found.append([self.device.to_host(array) for array in rows])
        if not found:
            return Nodes((), np.zeros(0, np.int64), np.zeros((0, C)), np.zeros((0, C)))
        return Nodes(blocks, *(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    # --- launches -----------------------------------------------------------------------------------------------------

    def _launch(self, launch: Launch, fields: Fields) -> None:
        self.device.launch(launch, pack(fields, launch.fields))

    def _channelwise(self, kernel: str, C: int, fields: Fields, dtype: str = "float32") -> None:
        self._launch(plan.channelwise(kernel, C, dtype), fields)

    def _elementwise(
        self,
        extents: Extents,
        kind: str,
        operands: dict[str, Operand],
        mask: Operand | None,
        options: tuple[str, ...],
        bits: Bits | None,
        coefficients: BackendArray,
    ) -> None:
        launch = plan.elementwise(extents, kind, operands["x"].dtype, options, self.device.limits)
        dense = bool(launch.octets) and plan.is_dense(launch, extents, tuple(operands.values()))
        fields = {**_operand_fields(launch, operands, mask), **self._bits_fields(bits), "dense": int(dense)}
        self._launch(launch, {**fields, "coefficients": self._at(coefficients)})

    def _resident(
        self, slab: Launch, extents: Extents, operands: dict[str, Operand], bits: Bits | None, fields: Fields
    ) -> None:
        self._launch(slab, {**_operand_fields(slab, operands, None), **self._bits_fields(bits), **fields})

    def _coefficients(
        self, C: int, dtype: str, statistics: Statistics, gamma: Vector | None, beta: Vector | None
    ) -> BackendArray:
        coefficients = self._new_coefficients(C, dtype)
        parameters = {**of_vector("gamma", gamma), **of_vector("beta", beta)}
        fields = {**self._statistics_fields(statistics), **parameters, "coefficients": self._at(coefficients)}
        self._channelwise("coefficients", C, fields, dtype)
        return coefficients

    # --- memory -------------------------------------------------------------------------------------------------------

    def _at(self, array: BackendArray) -> int:
        return self.device.address(array)

    def _new_statistics(self, C: int) -> Statistics:
        count, *others = self._parts(1, *(C,) * 4)
        return Statistics(count.view("int64").reshape(()), *others)

    def _new_coefficients(self, C: int, dtype: str) -> BackendArray:
        return self.device.empty((C, 6), "float64") if dtype == "float64" else self.device.empty((C, 8), "float32")

    def _new_rows(self, count: int, C: int) -> Rows:
        counts, first, second = self._parts(count, count * C, count * C)
        return Rows(counts.view("int64"), first.reshape(count, C), second.reshape(count, C))

    def _parts(self, *lengths: int) -> list[BackendArray]:
        """Float64 vectors in one allocation."""
        memory = self.device.empty((sum(lengths),), "float64")
        return [memory[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]

    def _new_bits(self, extents: Extents, kind: str) -> Bits:
        N, C, S = extents
        memory = self.device.empty((-(-N * C * S // 8),), "uint8")
        if kind == "channels":
            return Bits(memory, kind, 0, (C * S, 1, C))
        return Bits(memory, "rows", 0, (C * S, S, 1))

    def _statistics_fields(self, s: Statistics) -> Fields:
        return {name: self._at(array) for name, array in s._asdict().items()}

    def _rows_fields(self, name: str, rows: Rows) -> Fields:
        return {f"{name}_{part}": self._at(array) for part, array in rows._asdict().items()}

    def _bits_fields(self, bits: Bits | None) -> Fields:
        if bits is None:
            return {}
        steps = dict(zip(("bits_sample", "bits_channel", "bits_position"), bits.steps, strict=True))
        return {"bits": self._at(bits.memory), "bits_first": bits.first, **steps}


def _from_sample(n: int, o: Operand) -> Operand:
    return o._replace(pointer=o.pointer + n * o.sample_stride * ITEMSIZE[o.dtype])


def _present(**operands: Operand | None) -> dict[str, Operand]:
    return {name: o for name, o in operands.items() if o is not None}


def _normalize_options(residual: Operand | None, relu: bool, keep_bits: bool) -> tuple[str, ...]:
    return plan.option(OPERATION="NORMALIZE", RESIDUAL=residual is not None, RELU=relu, KEEP_BITS=keep_bits)


def _gradient_options(dresidual: Operand | None, gate: Gate, frozen: bool) -> tuple[str, ...]:
    return plan.option(
        OPERATION="GRADIENT", RESIDUAL=dresidual is not None, GATE=f"GATE_{gate.kind.upper()}", FROZEN=frozen
    )


def _elementwise_kind(extents: Extents, operands: dict[str, Operand], mask: Operand | None) -> str:
    return "strided" if mask is not None else plan.elementwise_kind(extents, tuple(operands.values()))


def _operand_fields(launch: Launch, operands: dict[str, Operand], mask: Operand | None) -> dict[str, int | float]:
    fields: dict[str, int | float] = {}
    for name, o in operands.items():
        fields |= of_operand(name, o, plan.octets_are_vectors(launch, o)) if launch.octets else of_scattered(name, o)
    return fields if mask is None else fields | of_scattered("mask", mask)
