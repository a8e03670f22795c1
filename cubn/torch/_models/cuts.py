"""Some samples of a batch, found again in everything that was computed of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree  # private, but what all of torch takes arguments apart with

from cubn.torch._models import bits
from cubn.torch._models.bits import NONE, Difference

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class IncomparableError(Exception):
    """Nobody can tell whether two runs gave the same; says why."""


class Cut(NamedTuple):
    """Samples start to stop of a batch of so many."""

    start: int
    stop: int
    samples: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.size == self.samples

    def of(self, arguments: Arguments) -> Any:
        """Copies of these samples of a model's arguments."""

        def rows(value: Tensor) -> Tensor:
            has_samples = value.ndim > 0 and len(value) == self.samples
            return (value[self.start : self.stop] if has_samples else value).clone()

        return _pytree.tree_map_only(Tensor, rows, arguments)

    def rows(self, recorded: Tensor, shape: torch.Size) -> Iterator[Tensor]:
        """What a tensor of this shape may hold of one of the whole batch: the axis that is shorter is the samples'.

        Samples and positions may have been made one axis, in any order: the first yielded has each sample's together.
        """
        if recorded.shape == shape:
            yield recorded
            return
        axis, length = self._shorter(recorded.shape, shape)
        each = length // self.samples
        yield recorded.narrow(axis, self.start * length // self.samples, shape[axis])
        for outer in range(2, each + 1):
            if each % outer == 0 and length % self.samples == 0:
                parts = torch.unflatten(recorded, axis, (outer, self.samples, each // outer))
                yield parts.narrow(axis + 1, self.start, self.size).flatten(axis, axis + 2)

    def _shorter(self, whole: torch.Size, part: torch.Size) -> tuple[int, int]:
        """The axis of the samples, and how long it is in the whole batch."""
        if len(whole) == len(part):
            axis, *others = (axis for axis in range(len(whole)) if whole[axis] != part[axis])
            proportional = part[axis] * self.samples == whole[axis] * self.size
            if proportional and not others and self.start * whole[axis] % self.samples == 0:
                return axis, whole[axis]
        shapes = f"shape {tuple(whole)} of {self.samples}, {tuple(part)} of {self.size}"
        raise IncomparableError(f"no axis is the batch: {shapes}")


class Values:
    """Arguments or a result taken apart, tensors copied, since modules may work in place."""

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = _pytree.tree_flatten(tree)
        self.leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def settle(self, tree: Any, cut: Cut) -> tuple[Any, Difference]:
        """The tree with the rows of these values wherever its own bits are others, and the largest difference."""
        leaves, spec = _pytree.tree_flatten(tree)
        if spec != self.spec:
            raise IncomparableError(f"other values of {cut.size} samples than of {cut.samples}")
        largest, settled = NONE, []
        for recorded, leaf in zip(self.leaves, leaves, strict=True):
            _check_comparable(recorded, leaf)
            if isinstance(leaf, Tensor):
                rows, found = _closest(cut.rows(recorded, leaf.shape), leaf)
                if found != NONE:
                    largest, leaf = largest.or_larger(found), _as_laid_out(rows, leaf)
            settled.append(leaf)
        return _pytree.tree_unflatten(settled, spec), largest

    def result_for(self, given: Any, result: Values, cut: Cut) -> Tensor:
        """Of a result that is one tensor, of the shape of the first of these values, what belongs to some of them."""
        recorded, leaf = _first_tensor(self.leaves), _first_tensor(_pytree.tree_leaves(given))
        for rows, found in zip(cut.rows(recorded, leaf.shape), cut.rows(result.leaves[0], leaf.shape), strict=True):
            if bits.equal(rows, leaf):
                return _as_laid_out(found, leaf)
        raise IncomparableError("inputs that could not be compared")


def _closest(candidates: Iterator[Tensor], leaf: Tensor) -> tuple[Tensor, Difference]:
    """The candidate that differs least, and by how much."""
    best, least = leaf, None
    for rows in candidates:
        found = NONE if bits.equal(rows, leaf) else bits.difference(rows, leaf)
        if least is None or found < least:
            best, least = rows, found
        if found == NONE:
            break
    return best, least or NONE


def _first_tensor(leaves: list[Any]) -> Tensor:
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


_SIZES_AND_OPTIONS = type(None), bool, int, str, bytes, torch.Size, torch.dtype, torch.device


def _check_comparable(recorded: Any, leaf: Any) -> None:
    """Sizes may differ with the number of samples."""
    if not isinstance(leaf, Tensor):
        same_number = isinstance(leaf, float | complex) and leaf == recorded
        if type(leaf) is type(recorded) and (isinstance(leaf, _SIZES_AND_OPTIONS) or same_number):
            return
        raise IncomparableError(f"a {type(leaf).__qualname__} instead of tensors")
    for tensor in (recorded, leaf):
        if not isinstance(tensor, Tensor) or not bits.is_dense(tensor):
            raise IncomparableError("not always a dense tensor")
    if recorded.dtype != leaf.dtype:
        raise IncomparableError(f"{recorded.dtype} of the whole batch, {leaf.dtype} of a part")


def _as_laid_out(rows: Tensor, leaf: Tensor) -> Tensor:
    """A copy of the rows in the layout of the leaf, which requires a gradient where that does."""
    copy = torch.empty_like(leaf, dtype=rows.dtype, requires_grad=False).copy_(rows)
    return copy.requires_grad_().clone() if leaf.requires_grad else copy  # a leaf must not be changed in place
