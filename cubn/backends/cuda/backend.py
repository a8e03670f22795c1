"""The backend protocol on CUDA: choose a plan, add the addresses, launch. Nothing here waits for the device."""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from cubn._tree import aligned_blocks, stack_order
from cubn._types import Affine, BackendArray, Extents, Gate, ITEMSIZE, Nodes, Operands, Running, Statistics, Vector
from cubn.backends.cuda import plan, prepare
from cubn.backends.cuda.device import Device
from cubn.backends.cuda.parameters import Fields as Addresses
from cubn.backends.cuda.parameters import of_vector, pack
from cubn.backends.cuda.prepare import Ready

Sums = tuple[BackendArray, BackendArray]

_POINTERS = tuple(f"{name}.pointer" for name in Operands._fields)


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
        self._orders = functools.lru_cache(256)(self._placed)

    # --- arrays -------------------------------------------------------------------------------------------------------

    def to_host(self, array: BackendArray, out: Any = None) -> Any:
        return self.device.to_host(array, out)

    def from_host(self, array: Any) -> BackendArray:
        return self.device.from_host(array)

    def staging(self, shape: tuple[int, ...]) -> Any:
        return self.device.staging(shape, "float64")

    def new_vector(self, C: int) -> tuple[BackendArray, Vector]:
        values = self.device.empty((C,), "float64")
        return values, Vector(self._at(values), "float64", 1)

    def keep(self, affine: Affine, kept: Affine, C: int) -> None:
        self._channelwise("keep", C, {**_of_affine(affine), **_of_kept(kept)})

    # --- statistics ---------------------------------------------------------------------------------------------------

    def moments(self, extents: Extents, arrays: Operands, start: int) -> Nodes:
        return self._nodes("Moments", extents, Operands(arrays.x, mask=arrays.mask), Gate("none"), {}, start)

    def root(self, nodes: Nodes) -> tuple[BackendArray, BackendArray, BackendArray]:
        return self._root_of("Moments", nodes)

    def root_sums(self, nodes: Nodes) -> Sums:
        return self._root_of("Sums", nodes)[1:]

    def statistics(self, count: Any, mean: Any, m2: Any, eps: float) -> Statistics:
        found = self._new_statistics(len(mean))._replace(count=count)
        self._channelwise(
            "statistics",
            len(mean),
            {**self._statistics_fields(found), "first": self._at(mean), "second": self._at(m2), "eps": eps},
        )
        return found

    def frozen_statistics(self, running: tuple[Vector, Vector], C: int, eps: float) -> Statistics:
        found = self._new_statistics(C)
        self._channelwise("frozen", C, {**self._statistics_fields(found), **_of_old(running), "eps": eps})
        return found

    def update(self, statistics: Statistics, running: Running) -> None:
        fields = {**self._statistics_fields(statistics), **self._running_fields(running)}
        self._channelwise("update", len(running.tracked), fields)

    # --- forward ------------------------------------------------------------------------------------------------------

    def train(
        self,
        extents: Extents,
        arrays: Operands,
        eps: float,
        affine: Affine,
        *,
        relu: bool,
        keep_bits: bool,
        kept: Affine | None = None,
        running: Running | None = None,
    ) -> tuple[Statistics, Bits | None]:
        found = self._new_statistics(extents.C)
        fields = {
            **self._statistics_fields(found),
            **_of_affine(affine),
            **(_of_kept(kept) if kept else {}),
            "eps": eps,
        }
        options = _normalize_options(arrays, relu, keep_bits)
        resident = prepare.resident(extents, options, 1, keep_bits, "", self.device.limits, prepare.layouts(arrays))
        if resident:
            bits = self._new_bits(extents, resident.kind) if keep_bits else None
            self._run(resident, arrays, bits, fields | (self._running_fields(running) if running else {}))
            return found, bits
        coefficients = self._new_coefficients(extents.C, arrays.x.dtype)
        fields["coefficients"] = self._at(coefficients)
        self._root("Moments", extents, Operands(arrays.x, mask=arrays.mask), Gate("none"), {}, fields)
        bits = self._normalize(extents, arrays, coefficients, relu, keep_bits)
        if running:  # last: an error on the way leaves the state as it was
            self.update(found, running)
        return found, bits

    def normalize(
        self,
        extents: Extents,
        arrays: Operands,
        statistics: Statistics,
        affine: Affine,
        *,
        relu: bool,
        keep_bits: bool,
    ) -> Bits | None:
        coefficients = self._coefficients(extents.C, arrays.x.dtype, statistics, affine)
        return self._normalize(extents, arrays, coefficients, relu, keep_bits)

    def forward(
        self,
        extents: Extents,
        arrays: Operands,
        running: tuple[Vector, Vector],
        eps: float,
        affine: Affine,
        *,
        relu: bool,
    ) -> None:
        coefficients = self._new_coefficients(extents.C, arrays.x.dtype)
        fields = {**_of_old(running), **_of_affine(affine), "eps": eps, "coefficients": self._at(coefficients)}
        self._channelwise("frozen", extents.C, fields, arrays.x.dtype)
        self._normalize(extents, arrays, coefficients, relu, False)

    def _normalize(
        self, extents: Extents, arrays: Operands, coefficients: BackendArray, relu: bool, keep_bits: bool
    ) -> Bits | None:
        if 0 in extents:
            return None
        options = _normalize_options(arrays, relu, keep_bits)
        ready = prepare.elementwise(extents, options, "", self.device.limits, prepare.layouts(arrays))
        bits = self._new_bits(extents, ready.kind) if keep_bits else None
        self._run(ready, arrays, bits, {"coefficients": self._at(coefficients)})
        return bits

    # --- backward -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        extents: Extents,
        arrays: Operands,
        statistics: Statistics,
        affine: Affine,
        *,
        frozen: bool,
        gate: Gate,
        parameters: tuple[Vector, Vector] | None = None,
    ) -> Sums:
        sums = first, second = tuple(self._parts(extents.C, extents.C))
        fields = {
            **self._statistics_fields(statistics),
            **(_of_gradients(*parameters) if parameters else {}),
            "first": self._at(first),
            "second": self._at(second),
        }
        options, kind = _gradient_options(arrays, gate, frozen), gate.bits.kind if gate.bits else ""
        resident = prepare.resident(extents, options, 2, False, kind, self.device.limits, prepare.layouts(arrays))
        if resident:
            self._run(resident, arrays, gate.bits, {**fields, **_of_affine(affine)})
            return sums
        coefficients = self._coefficients(extents.C, arrays.x.dtype, statistics, affine)
        fields["coefficients"] = self._at(coefficients)
        self._root("Sums", extents, arrays._replace(y=None, r=None), gate, fields, fields)
        self._input_gradient(extents, arrays, coefficients, frozen, gate)
        return sums

    def backward_sums(
        self,
        extents: Extents,
        arrays: Operands,
        statistics: Statistics,
        affine: Affine,
        *,
        gate: Gate,
        start: int,
    ) -> Nodes:
        coefficients = self._coefficients(extents.C, arrays.x.dtype, statistics, affine)
        read = arrays._replace(y=None, r=None)
        return self._nodes("Sums", extents, read, gate, {"coefficients": self._at(coefficients)}, start)

    def backward_apply(
        self,
        extents: Extents,
        arrays: Operands,
        statistics: Statistics,
        affine: Affine,
        sums: Sums | None,
        *,
        gate: Gate,
    ) -> None:
        coefficients = self._coefficients(extents.C, arrays.x.dtype, statistics, affine)
        if sums is not None:
            first, second = sums
            fields = {
                **self._statistics_fields(statistics),
                "coefficients": self._at(coefficients),
                "first": self._at(first),
                "second": self._at(second),
            }
            self._channelwise("gradient_coefficients", extents.C, fields, arrays.x.dtype)
        self._input_gradient(extents, arrays, coefficients, sums is None, gate)

    def _input_gradient(
        self, extents: Extents, arrays: Operands, coefficients: BackendArray, frozen: bool, gate: Gate
    ) -> None:
        if 0 in extents:
            return
        options, kind = _gradient_options(arrays, gate, frozen), gate.bits.kind if gate.bits else ""
        ready = prepare.elementwise(extents, options, kind, self.device.limits, prepare.layouts(arrays))
        self._run(ready, arrays, gate.bits, {"coefficients": self._at(coefficients)})

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        first, second = sums
        fields = {
            **self._statistics_fields(statistics),
            **_of_gradients(dgamma, dbeta),
            "first": self._at(first),
            "second": self._at(second),
        }
        self._channelwise("parameter_gradients", len(first), fields)

    # --- the tree -----------------------------------------------------------------------------------------------------

    def _root(
        self, what: str, extents: Extents, arrays: Operands, gate: Gate, fields: Addresses, last: Addresses
    ) -> None:
        """Reduce a batch, whose tree begins at its first sample, and let `finish` say what follows, with the last."""
        N, C, S = extents
        if N * S:
            rows, finish = self._reduce(what, extents, arrays, gate, fields)
        else:
            rows = Rows(self.device.zeros((1,), "int64"), *(self.device.zeros((1, C), "float64") for _ in range(2)))
            finish = prepare.finish(C, what, 1, arrays.x.dtype)
        self._launch(finish, {**self._rows_fields("from", rows), **last})

    def _reduce(self, what: str, extents: Extents, arrays: Operands, gate: Gate, fields: Addresses) -> tuple[Rows, Ready]:
        """Rows of nodes of a batch that has values, few enough for the launch that comes with them."""
        kind, limits = gate.bits.kind if gate.bits else "", self.device.limits
        cut = prepare.reduction(extents, what, gate.kind, kind, limits, prepare.layouts(arrays))
        rows = self._new_rows(cut.rows, extents.C)
        self._run(cut.reduce, arrays, gate.bits, {**fields, **self._rows_fields("node", rows)})
        for merge, left in cut.merges:
            rows = self._merge(merge, rows, left)
        return rows, cut.finish

    def _merge(self, merge: Ready, rows: Rows, left: int) -> Rows:
        merged = self._new_rows(left, rows.first.shape[1])
        self._launch(merge, {**self._rows_fields("from", rows), **self._rows_fields("node", merged)})
        return merged

    def _nodes(self, what: str, extents: Extents, arrays: Operands, gate: Gate, fields: Addresses, start: int) -> Nodes:
        """One node for each maximal aligned block of samples: each is a batch of its own."""
        N, C, S = extents
        blocks = aligned_blocks(start, start + N) if S else ()
        nodes = Nodes(blocks, self.device.empty((len(blocks), 2 * C + 1), "float64"))
        for i, (lo, hi) in enumerate(blocks):
            at = lo - start
            part = _from_sample(at, arrays)
            bits = gate.bits and gate.bits._replace(first=gate.bits.first + at * gate.bits.steps[0])
            rows, _ = self._reduce(what, extents._replace(N=hi - lo), part, gate._replace(bits=bits), fields)
            count = len(rows.count)
            row = Rows(*(column[i : i + 1] for column in (nodes.count, nodes.first, nodes.second)))
            merge = prepare.merge_rows(C, what, count)
            self._launch(merge, {**self._rows_fields("from", rows), **self._rows_fields("node", row)})
        return nodes

    def _root_of(self, what: str, nodes: Nodes) -> tuple[BackendArray, BackendArray, BackendArray]:
        C = nodes.table.shape[1] // 2
        count, first, second = self._parts(1, C, C)
        order = stack_order(nodes.blocks)
        fields = {
            "table": self._at(nodes.table),
            "table_step": nodes.table.strides[0] // 8,
            "count": self._at(count),
            "first": self._at(first),
            "second": self._at(second),
        }
        merges = self._orders(order) if order else None  # held: what two threads make at once, the cache has of one
        if merges is not None:
            fields["merges"] = self._at(merges)
        self._launch(prepare.root(C, what, order), fields)
        return count.view("int64").reshape(()), first, second

    def _placed(self, order: tuple[int, ...]) -> BackendArray:
        """An order of merges on the device, for streams of all kinds."""
        placed = self.device.from_host(np.array(order, np.int64))
        self.device.synchronize()
        return placed

    # --- launches -----------------------------------------------------------------------------------------------------

    def _launch(self, ready: Ready, fields: Addresses) -> None:
        self.device.launch(ready.launch, pack(fields, ready.words))

    def _run(self, ready: Ready, arrays: Operands, bits: Bits | None, fields: Addresses) -> None:
        addresses = {name: o.pointer for name, o in zip(_POINTERS, arrays, strict=True) if o is not None}
        self._launch(ready, {**fields, **addresses, **self._bits_fields(bits)})

    def _channelwise(self, kernel: str, C: int, fields: Addresses, dtype: str = "float32") -> None:
        self._launch(prepare.channelwise(kernel, C, dtype), fields)

    def _coefficients(self, C: int, dtype: str, statistics: Statistics, affine: Affine) -> BackendArray:
        coefficients = self._new_coefficients(C, dtype)
        fields = {**self._statistics_fields(statistics), **_of_affine(affine), "coefficients": self._at(coefficients)}
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

    def _statistics_fields(self, s: Statistics) -> Addresses:
        return {name: self._at(array) for name, array in s._asdict().items()}

    def _running_fields(self, running: Running) -> dict[str, int | float]:
        mean, var = running.new
        return {
            **_of_old(running.old),
            **of_vector("new_mean", mean),
            **of_vector("new_var", var),
            "tracked": self._at(running.tracked),
            "skipped": self._at(running.skipped),
            "momentum": running.momentum or 0.0,
            "cumulative": int(running.momentum is None),
            "ddof": int(not running.biased),
        }

    def _rows_fields(self, name: str, rows: Rows) -> Addresses:
        return {f"{name}_{part}": self._at(array) for part, array in rows._asdict().items()}

    def _bits_fields(self, bits: Bits | None) -> Addresses:
        if bits is None:
            return {}
        steps = dict(zip(("bits_sample", "bits_channel", "bits_position"), bits.steps, strict=True))
        return {"bits": self._at(bits.memory), "bits_first": bits.first, **steps}


def _from_sample(n: int, arrays: Operands) -> Operands:
    """The arrays but for the n samples before."""
    return Operands(
        *(o and o._replace(pointer=o.pointer + n * o.sample_stride * ITEMSIZE[o.dtype]) for o in arrays)  # type: ignore[arg-type]
    )


def _of_affine(affine: Affine) -> Addresses:
    return {**of_vector("gamma", affine.gamma), **of_vector("beta", affine.beta)}


def _of_kept(kept: Affine) -> Addresses:
    return {f"kept_{name}": copy.pointer for name, copy in kept._asdict().items() if copy}


def _of_gradients(dgamma: Vector, dbeta: Vector) -> Addresses:
    return {**of_vector("dgamma", dgamma), **of_vector("dbeta", dbeta)}


def _of_old(running: tuple[Vector, Vector]) -> Addresses:
    mean, var = running
    return {**of_vector("old_mean", mean), **of_vector("old_var", var)}


def _normalize_options(arrays: Operands, relu: bool, keep_bits: bool) -> tuple[str, ...]:
    return plan.option(OPERATION="NORMALIZE", RESIDUAL=arrays.g is not None, RELU=relu, KEEP_BITS=keep_bits)


def _gradient_options(arrays: Operands, gate: Gate, frozen: bool) -> tuple[str, ...]:
    return plan.option(
        OPERATION="GRADIENT", RESIDUAL=arrays.r is not None, GATE=f"GATE_{gate.kind.upper()}", FROZEN=frozen
    )
