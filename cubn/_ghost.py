"""Ghost batches: groups of neighbouring samples, each normalised by statistics of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cubn._arguments import as_int
from cubn._arrays.library import ALIGNMENT
from cubn._arrays.memory import view
from cubn._differentiation import AnyGradients, Differentiation
from cubn._entries import MOST
from cubn._groups import Cut, Piece, blocks_of, group_ranges, pieces, tree_slices
from cubn._inputs import Inputs
from cubn._layout import from_sample
from cubn._training import SynchronisedTraining, Training
from cubn._types import ITEMSIZE, Affine, Extents, Nodes, Operands, Statistics, Vector
from cubn.backends.in_steps import below, stacked
from cubn.backends.protocol import Backend, PreparedBackward, PreparedTrain, ReluMask, Sums
from cubn.errors import message
from cubn.saved import Groups, Saved
from cubn.sync.collective import Gathered, Terms

PreparedT = TypeVar("PreparedT")


class GhostTraining(Training):
    """A forward_train of which every group is a batch of its own; nothing is changed yet."""

    def __init__(self, groups: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.size = _group_size(groups, self.inputs.extents)
        N = self.inputs.extents.N
        self.pieces = pieces(0, N, N, self.size)

    def check_count(self) -> None:
        super().check_count()
        if self.values is not None:
            _check_groups(_present(self.inputs, self.pieces), self.inputs.extents.N, self.size)

    def run(self) -> tuple[Any, Saved[Any]]:
        self._check_turn()
        whole = self._whole() if self.updates else None  # before y, which may be written over x
        trained = list(self._train_groups())
        y = self.output.finish()
        if whole is not None:
            self._update(whole)
        statistics, relu_masks = zip(*trained, strict=True)
        return y, self.saved(statistics[0], None, groups=Groups(self.size, statistics, self.pieces, relu_masks))

    def _whole(self) -> Statistics:
        """Of all samples together, in the tree of the batch."""
        backend, extents = self.backend, self.inputs.extents
        root = backend.root(backend.moments(extents, self.operands, 0))
        return backend.statistics(*root, self.eps, backend.new_statistics(extents.C, Affine(None, None)))

    def _train_groups(self) -> Iterator[tuple[Statistics, ReluMask | None]]:
        held = self.inputs.held
        gamma, beta, *_ = held.addresses

        def prepare(extents: Extents, operands: Operands, _: None) -> PreparedTrain:
            return self.backend.prepare_train(extents, operands, held.affine, None, False, self.options)

        for prepared, (x, residual, y, _, mask) in _calls(prepare, self.inputs.extents, self.operands, self.pieces):
            yield prepared(x, residual, y, mask, gamma, beta, self.eps)


class SynchronisedGhostTraining(SynchronisedTraining):
    """The same over several ranks: the nodes of all groups, and those of the whole batch, in one exchange."""

    def __init__(self, groups: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.size = _group_size(groups, self.inputs.extents)

    @cached_property
    def terms(self) -> Terms:
        return super().terms._replace(cut=Cut(self.size))

    def part(self, start: int, total: int) -> Nodes:
        extents, moments = self.inputs.extents, self.backend.moments
        whole = moments(extents, self.operands, start)
        if not whole.blocks:
            return whole
        stop = start + extents.N
        of_pieces = [
            moments(extents._replace(N=hi - lo), from_sample(lo, self.operands), first)
            for _, first, lo, hi in pieces(start, stop, total, self.size)
        ]
        return _joined(blocks_of(start, stop, total, self.terms.cut), (*of_pieces, whole), self.backend)

    def _normalized(self, gathered: Gathered) -> tuple[Any, Saved[Any]]:
        backend, extents, samples = self.backend, self.inputs.extents, gathered.samples
        *of_groups, of_whole = _trees(gathered.nodes)
        if backend.device is None:
            _check_groups([int(nodes.count.sum()) for nodes in of_groups], sum(samples), self.size)
        statistics = tuple(self._statistics(nodes) for nodes in of_groups)
        first = sum(samples[: gathered.context.communicator.rank])
        here = pieces(first, first + extents.N, sum(samples), self.size)
        relu_masks = tuple(self._normalize(piece, statistics[piece.group]) for piece in here)
        y = self.output.finish()
        if self.updates:
            self._update(self._statistics(of_whole))
        groups = Groups(self.size, statistics, here, relu_masks)
        return y, self.saved(statistics[0], None, gathered.context, groups=groups)

    def _statistics(self, nodes: Nodes) -> Statistics:
        """Of a tree, with the gamma and beta that the forward began with."""
        backend, began_with = self.backend, self.statistics.affine
        into = backend.new_statistics(self.statistics.C, began_with)
        backend.keep(began_with, into)
        return backend.statistics(*backend.root(nodes), self.eps, into)

    def _normalize(self, piece: Piece, statistics: Statistics) -> ReluMask | None:
        extents = self.inputs.extents._replace(N=piece.hi - piece.lo)
        operands = from_sample(piece.lo, self.operands)
        return self.backend.normalize(extents, operands, statistics, statistics.affine, self.options)


class GhostDifferentiation(Differentiation):
    """A backward of groups: dx of each one by itself, dgamma and dbeta of all of them."""

    @property
    def groups(self) -> Groups:
        assert self.forward.groups is not None
        return self.forward.groups

    @cached_property
    def terms(self) -> Terms:
        return super().terms._replace(cut=Cut(self.groups.size, whole=False))

    def run(self) -> AnyGradients:
        if self.in_given and self._may_fail():
            sums = [self.backend.root_sums(nodes) for nodes in self._parts()]
            return self._apply_groups(sums, sums)
        self._write_parameters(list(self._backward_groups()))
        return self._written(self._of_channels(None))

    def _backward_groups(self) -> Iterator[Sums | None]:
        """dx, and the sums of each group where there are parameters."""
        backend, (_, statistics, here, relu_masks), wanted = self.backend, self.groups, self.parameters is not None

        def prepare(extents: Extents, operands: Operands, relu_mask: ReluMask | None) -> PreparedBackward:
            return backend.prepare_backward(extents, operands, statistics[0], relu_mask, None, self.options)

        calls = _calls(prepare, self.inputs.extents, self.operands, here, relu_masks)
        for (prepared, at), piece, relu_mask in zip(calls, here, relu_masks, strict=True):
            yield prepared(*at, statistics[piece.group], relu_mask, 0, 0, wanted)

    def _parts(self) -> Iterator[Nodes]:
        """The nodes of each piece."""
        _, statistics, here, relu_masks = self.groups
        for (group, start, lo, hi), relu_mask in zip(here, relu_masks, strict=True):
            extents, operands = self.inputs.extents._replace(N=hi - lo), from_sample(lo, self.operands)
            yield self.backend.backward_sums(extents, operands, statistics[group], relu_mask, self.options, start)

    def part(self, start: int, total: int) -> Nodes:
        found = [nodes for nodes in self._parts() if nodes.blocks]
        if not found:
            return Nodes((), self.backend.from_host(np.empty((0, 2 * self.inputs.extents.C + 1))))
        blocks = tuple(block for nodes in found for block in nodes.blocks)
        return _joined(blocks, found, self.backend)

    def finish(self, gathered: Gathered) -> AnyGradients:
        root_sums, of_all = self.backend.root_sums, _trees(gathered.nodes)
        here = {piece.group for piece in self.groups.pieces}
        sums = {group: root_sums(nodes) for group, nodes in enumerate(of_all) if self.everywhere or group in here}
        own = list(sums.values()) if self.everywhere else [root_sums(nodes) for nodes in _trees(gathered.own)]
        return self._apply_groups(own, [sums[piece.group] for piece in self.groups.pieces])

    def _apply_groups(self, own: Sequence[Sums], of_pieces: Sequence[Sums]) -> AnyGradients:
        """Parameter gradients from own sums of neighbouring groups, then dx: what may fail comes before `out`."""
        self._write_parameters(own)
        of_channels = self._of_channels(None)
        _, statistics, here, relu_masks = self.groups
        for (group, _, lo, hi), relu_mask, sums in zip(here, relu_masks, of_pieces, strict=True):
            extents, operands = self.inputs.extents._replace(N=hi - lo), from_sample(lo, self.operands)
            self.backend.backward_apply(extents, operands, statistics[group], relu_mask, sums, self.options)
        return self._written(of_channels)

    def _write_parameters(self, sums: Sequence[Sums | None]) -> None:
        """dgamma and dbeta of neighbouring groups, all of them or from the first one here on, rounded once."""
        if self.parameters is None:
            return
        backend, C = self.backend, self.inputs.extents.C
        first = self.groups.pieces[0].group if sums and not self.everywhere else 0
        each = self.groups.statistics[first : first + len(sums)]
        table = _counted(each, C, backend)
        row = backend.address(table) + 8
        for statistics, of_group in zip(each, sums, strict=True):
            assert of_group is not None
            dbeta, dgamma = Vector(row, "float64", 1), Vector(row + 8 * C, "float64", 1)
            backend.parameter_gradients(statistics, of_group, dgamma, dbeta)
            row += 8 * (2 * C + 1)
        groups = tuple((group, group + 1) for group in range(first, first + len(sums)))
        of_beta, of_gamma = backend.root_sums(Nodes(groups, table))
        unused = backend.new_statistics(C, Affine(None, None))
        scratch = Vector(unused.at("mean"), "float64", 1)
        for total, to in zip((of_gamma, of_beta), self.parameters, strict=True):
            backend.parameter_gradients(self.forward.statistics, (total, total), scratch, to)


# --- groups, and pieces of them -------------------------------------------------------------------------------------


def _group_size(groups: int, extents: Extents) -> int:
    """Samples of a group, as given."""
    size = as_int(groups, "groups")
    if not 0 < size < MOST:
        raise ValueError(message("groups", "be 1 or more and less than 2**62, the samples of a group", size))
    if extents.N and size == extents.S == 1:
        rule = "be 2 or more where a sample has one value per channel"
        raise ValueError(message("groups", rule, size, "The variance of one value is 0."))
    return size


def _check_groups(counts: Sequence[int], N: int, size: int) -> None:
    """Every group needs two values per channel, as a batch does."""
    for group, (count, (lo, hi)) in enumerate(zip(counts, group_ranges(N, size), strict=True)):
        if count < 2:
            rule = "have more than one value per channel in every group"
            got = f"{count} in group {group}, samples {lo} to {hi - 1}"
            remedy = "Use larger groups, or leave those samples out of the batch."
            raise ValueError(message("x", rule, got, remedy))


def _present(inputs: Inputs, here: Sequence[Piece]) -> list[int]:
    """Values per channel of each piece, behind a mask on the host if there is one."""
    (N, _, S), mask, x = inputs.extents, inputs.mask, inputs.x
    if mask is None:
        return [(hi - lo) * S for _, _, lo, hi in here]
    values = view(mask)
    if values.ndim == len(x.shape):
        values = values.squeeze(inputs.axis)
    repeats = S // max(1, math.prod(values.shape[1:]))
    each = np.broadcast_to(np.count_nonzero(values, axis=tuple(range(1, values.ndim))) * repeats, N)
    return [int(each[lo:hi].sum()) for _, _, lo, hi in here]


class _At(NamedTuple):
    """Addresses of operands; 0 for what is absent."""

    x: int
    g: int
    y: int
    r: int
    mask: int


def _calls(
    prepare: Callable[[Extents, Operands, Any], PreparedT],
    extents: Extents,
    operands: Operands,
    here: Sequence[Piece],
    relu_masks: Sequence[ReluMask | None] | None = None,
) -> Iterator[tuple[PreparedT, _At]]:
    """A prepared call for each piece, one for all that have the same layout, and the addresses that it takes."""
    prepared: dict[tuple[Any, ...], PreparedT] = {}
    steps = [(o.pointer, o.sample_stride * ITEMSIZE[o.dtype]) if o else (0, 0) for o in operands]
    for (_, _, lo, hi), relu_mask in zip(here, relu_masks or [None] * len(here), strict=True):
        at = _At(*[first + lo * step for first, step in steps])
        key = (hi - lo, relu_mask and relu_mask.layout, *[address % ALIGNMENT for address in at])
        call = prepared.get(key)
        if call is None:
            call = prepared[key] = prepare(extents._replace(N=hi - lo), from_sample(lo, operands), relu_mask)
        yield call, at


# --- nodes of several trees -----------------------------------------------------------------------------------------


def _joined(blocks: tuple[tuple[int, int], ...], each: Sequence[Nodes], backend: Backend) -> Nodes:
    return Nodes(blocks, below([nodes.table for nodes in each], backend))


def _trees(nodes: Nodes) -> list[Nodes]:
    """The nodes of each tree."""
    return [Nodes(nodes.blocks[rows], nodes.table[rows]) for rows in tree_slices(nodes.blocks)]


def _counted(each: Sequence[Statistics], C: int, backend: Backend) -> Any:
    """A table of nodes of these counts, whose sums are still to be written."""
    if not each:
        return backend.from_host(np.empty((0, 2 * C + 1)))
    counts = stacked("count", each, backend).view("float64")
    if backend.device is None:
        return np.hstack((counts, np.empty((len(each), 2 * C))))
    return backend.device.beside((counts, backend.device.zeros((len(each), 2 * C), "float64")))
