"""Calls that were made before: what a full call found out about its arguments holds for others with the same layouts.

The first call with a signature goes the full way, with every check, and leaves a `Call` behind. Later ones check only
what can differ: that arrays are where they can be read, that the state still holds its own, that nothing overlaps. What
does not match goes the full way again, which finds the words for what is wrong.

A signature is made of layouts (see `Library.signature`), the state's `StateLayout` and options; it holds no array.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from cubn._arrays import SIGNATURES, Array, Layout, addresses
from cubn._arrays.library import ALIGNMENT, Library
from cubn._inputs import Inputs
from cubn._kept import Store
from cubn._state.arrays import StateArrays
from cubn.backends import threads
from cubn.state import BatchNormState

PreparedT = TypeVar("PreparedT")
FactsT = TypeVar("FactsT")

new_tuple = tuple.__new__
"""Makes a NamedTuple of its fields, in a third of the time."""

_stores: list[Store[Any]] = []


def new_store() -> Store[Any]:
    """Room for the calls of one operation."""
    store: Store[Any] = Store(4 << 20)
    _stores.append(store)
    return store


def clear() -> None:
    """Forget all calls."""
    for store in _stores:
        store.cache_clear()


class Call(Generic[PreparedT, FactsT]):
    """An operation on arrays of given layouts, but for where they are."""

    __slots__ = ("_apart", "_in_place", "_y", "alignment", "allocate", "facts", "library", "nbytes", "prepared")

    def __init__(
        self,
        prepared: PreparedT,
        facts: FactsT,
        x: Array,
        y: Array,
        in_place: Iterable[Array | None] = (),
        apart: Iterable[Array | None] = (),
    ) -> None:
        self.prepared = prepared
        self.facts = facts
        self.library: Library = x.library
        self.allocate = x.library.allocator(y.shape, y.strides, y.dtype, x)
        self.nbytes = int(getattr(prepared, "nbytes", 0))
        self.alignment = y.pointer % ALIGNMENT  # of y: memory that is allocated for it must have the same
        self._y = _reach(y)
        self._in_place = tuple(a and (*_reach(a), x.library.layout(a) == x.library.layout(y)) for a in in_place)
        self._apart = tuple(a and _reach(a) for a in apart)

    def takes(self, out: Any, at: int, in_place: Iterable[int], apart: Iterable[int], held: StateArrays | None) -> bool:
        """Whether a given `out` can be written, is exactly one of the arrays that it may be, or shares no memory with
        any of them, and none with others and the state's.
        """
        if not self.library.writable(out):
            return False
        low, high = self._y
        low, high = at + low, at + high
        for begin, reach in zip(in_place, self._in_place, strict=True):
            if (
                reach is not None
                and begin + reach[0] < high
                and low < begin + reach[1]
                and not (reach[2] and begin == at)
            ):
                return False
        for begin, span in zip(apart, self._apart, strict=True):
            if span is not None and begin + span[0] < high and low < begin + span[1]:
                return False
        if held is not None:
            for region in held.regions:
                if region.low < high and low < region.high:
                    return False
        return True


def _reach(array: Array) -> tuple[int, int]:
    """Bytes from an array's address: the lowest it uses, and one past the highest."""
    low, high = addresses(array)
    return low - array.pointer, high - array.pointer


Found = tuple[Any, StateArrays, int, int, int, int]
"""A call, what the state holds, and where x, residual, mask and out are."""


def find(
    store: Store[Any], x: Any, state: BatchNormState, mask: Any, residual: Any, out: Any, *options: Any
) -> Found | None:
    """The call that was made before with such arguments; None where they have to go the full way."""
    if type(state) is not BatchNormState:
        return None
    read, held = SIGNATURES.get(type(x)), state._held
    if read is None or held is None or not held.describes(state._arrays):
        return None
    if (found := read(x)) is None:
        return None
    layout, at_x = found
    mask_layout = residual_layout = out_layout = None
    at_mask = at_residual = at_out = 0
    if mask is not None:
        if (found := signature(mask)) is None:
            return None
        mask_layout, at_mask = found
    if residual is not None:
        if (found := signature(residual)) is None:
            return None
        residual_layout, at_residual = found
    if out is not None:
        if (found := signature(out)) is None:
            return None
        out_layout, at_out = found
    features, _, _, axis, variance = state._options
    layouts = layout, mask_layout, residual_layout, out_layout
    entry = store.entries.get((*layouts, threads.limit, held.layout, features, axis, variance, *options))
    if entry is None:
        return None
    entry.asked_for = True
    call = entry.value
    if out is not None and not call.takes(out, at_out, (at_x, at_residual), (at_mask,), held):
        return None
    return call, held, at_x, at_residual, at_mask, at_out


def look_up(store: Store[Any], arrays: tuple[Any, ...], *options: Any) -> tuple[Any, list[int]] | None:
    """The call that was made before with such arrays, some of which may be None, and where they are."""
    key: list[Any] = []
    at = []
    for x in arrays:
        found = (None, 0) if x is None else signature(x)
        if found is None:
            return None
        key.append(found[0])
        at.append(found[1])
    call = store.get((*key, threads.limit, *options))
    return None if call is None else (call, at)


def add(store: Store[Any], call: Any, arrays: tuple[Array | None, ...], *options: Any) -> None:
    """Keep a call for others with arrays like those, where they can be recognized."""
    layouts = [array and array.library.layout(array) for array in arrays]
    if all(layout or not array for array, layout in zip(arrays, layouts, strict=True)):
        store.add((*layouts, threads.limit, *options), call)


def remember(
    store: Store[Any], call: Call[Any, Any], inputs: Inputs, state: BatchNormState, out: Array | None, *options: Any
) -> None:
    """Keep a call for others with such arguments, where they can be recognized."""
    if type(state) is not BatchNormState or state._options is not inputs.options:
        return  # a subclass may have options of its own, and another thread may have changed them meanwhile
    features, _, _, axis, variance = state._options
    arrays = inputs.x, inputs.mask, inputs.residual_or_dy, out
    add(store, call, arrays, inputs.held.layout, features, axis, variance, *options)


def signature(x: Any) -> tuple[Layout, int] | None:
    """An array's layout and address, where they are found quickly."""
    read = SIGNATURES.get(type(x))
    return None if read is None else read(x)
