"""What a forward leaves for its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, NoReturn, Self, cast

from cubn._arguments import shown
from cubn._arrays import Array
from cubn._groups import Piece
from cubn._inputs import Inputs
from cubn._state.arrays import StateArrays
from cubn._types import BackendArray, Extents, ReluGradient, Renormalised, Statistics
from cubn._weak import WeakValues
from cubn.backends.in_steps import stacked
from cubn.backends.protocol import Backend, ReluMask
from cubn.sync.collective import SyncContext
from cubn.typing import ArrayT_co


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Layouts:
    """What a forward was given but for where it was; one object for all forwards that share it."""

    x: Array  # like the mask, without an owner and of no address
    axis: int
    extents: Extents
    backend: Backend
    mask: Array | None
    residual: bool
    relu: ReluGradient
    renorm: bool

    @classmethod
    def of(cls, inputs: Inputs, relu: ReluGradient, *, renorm: bool = False) -> Layouts:
        x, axis, extents, backend, _, mask, residual, _ = inputs
        key = x.nowhere(), axis, extents, backend, mask and mask.nowhere(), residual is not None, relu, renorm
        found = _LAYOUTS.get(key)
        if found is None:
            found = _LAYOUTS[key] = cls(*key)
        return found


_LAYOUTS: WeakValues[tuple[Any, ...], Layouts] = WeakValues()


class Read(NamedTuple):
    """An array that a forward read and its backward will read, where it was, and which version."""

    owner: Any
    pointer: int
    version: int | None
    capsule: object

    @classmethod
    def of(cls, array: Array) -> Self:
        return cls(array.owner, array.pointer, array.library.version(array.owner), array.capsule)

    def like(self, array: Array) -> Array:
        """The array, of a layout."""
        return array._replace(pointer=self.pointer, owner=self.owner, capsule=self.capsule)


class Groups(NamedTuple):
    """Of a forward by ghost batches: the statistics of all of them, and where the samples here belong."""

    size: int
    statistics: tuple[Statistics, ...]
    pieces: tuple[Piece, ...]
    relu_masks: tuple[ReluMask | None, ...]
    """Of each piece."""


class Forward(NamedTuple):
    """What a backward needs of its forward."""

    layouts: Layouts
    x: Read
    mask: Read | None
    held: StateArrays
    """Where gamma, beta and the running statistics came from."""
    statistics: Statistics
    relu_mask: ReluMask | None
    frozen: bool = False
    """Whether x was normalised by running statistics."""
    overwritten: bool = False
    """Whether y was written over x."""
    context: SyncContext | None = None
    groups: Groups | None = None
    """Of ghost batches; then the statistics above are the first group's, and there is no relu mask."""

    @property
    def inputs(self) -> Inputs:
        """x and the mask as they were given."""
        layouts = self.layouts
        mask = self.mask.like(layouts.mask) if self.mask and layouts.mask else None
        return Inputs(self.x.like(layouts.x), layouts.axis, layouts.extents, layouts.backend, self.held, mask)


class Saved(Generic[ArrayT_co]):
    """What `backward` needs from the forward that returned it.

    Holds a reference to x (and to the mask), and copies of everything else, so that later updates of the state do not
    change a backward. May be used several times. x (and the mask) must stay as they are until the last of them: a
    PyTorch tensor that was changed in place is noticed, a change of another library's array is not.

    Only a forward makes one, and nothing changes it: what it gives out are copies. On a CUDA device they are arrays of
    x's library, ordered as its own (views, for PyTorch and CuPy); CuPy's for a library that cubn does not know.

    Attributes
    ----------
    x : array
        As given.
    count : int64 array of shape ()
        Values per channel; 0 where the statistics were frozen.
    mean, var, invstd : float64 arrays of shape (C,)
        The statistics x was normalised by; invstd = 1 / sqrt(var + eps).
    r, d : float64 arrays of shape (C,), or None
        After `forward_train` with `renorm=`: y = (xhat * r + d) * gamma + beta. None without.
    relu_bits : object or None
        After a residual and a ReLU: which elements of y are positive or NaN, at one bit an element, packed as suits the
        backend. Without a residual they are recomputed from x, and nothing of the input's size is kept.

    Notes
    -----
    Of a forward with `groups=`, count is of shape (G,), mean, var and invstd are of shape (G, C), a row for each group
    of the whole batch in its order, on every rank; relu_bits is a tuple, of the parts of groups that are here.
    """

    __slots__ = ("_forward",)
    _forward: Forward

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        raise TypeError("Saved: only forward_train and forward_frozen make one; it is their second result.")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("Saved: no class can be derived from it.")

    @classmethod
    def _of(cls, forward: Forward) -> Self:
        self = object.__new__(cls)
        keep(self, forward)
        return self

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Saved: {name} cannot be changed. backward reads what the forward left.")

    def __delattr__(self, name: str) -> NoReturn:
        self.__setattr__(name, None)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "Saved: it cannot be copied or pickled, since it knows x by its address. "
            "Keep x and the state instead, and call the forward again."
        )

    def __repr__(self) -> str:
        forward = self._forward
        layouts, homes = forward.layouts, forward.held.arrays
        of = "running statistics" if forward.frozen else "its own statistics"
        if forward.groups:
            of = f"those of {len(forward.groups.statistics)} groups"
        of += ", renormalised" if layouts.renorm else ""
        parts = {"x": layouts.x, "gamma": homes.get("gamma"), "beta": homes.get("beta"), "mask": layouts.mask}
        arrays = ", ".join(f"{name}={shown(array)}" for name, array in parts.items())
        return f"Saved({arrays}, residual={layouts.residual}, relu={layouts.relu != 'none'}, normalised by {of})"

    @property
    def x(self) -> ArrayT_co:
        return cast(ArrayT_co, self._forward.x.owner)

    @property
    def count(self) -> Any:
        return self._of_statistics("count")

    @property
    def mean(self) -> Any:
        return self._of_statistics("mean")

    @property
    def var(self) -> Any:
        return self._of_statistics("var")

    @property
    def invstd(self) -> Any:
        return self._of_statistics("invstd")

    @property
    def r(self) -> Any:
        statistics = self._forward.statistics
        return self._apart(statistics.r) if isinstance(statistics, Renormalised) else None

    @property
    def d(self) -> Any:
        statistics = self._forward.statistics
        return self._apart(statistics.d) if isinstance(statistics, Renormalised) else None

    @property
    def relu_bits(self) -> Any:
        forward = self._forward
        if forward.groups and forward.layouts.relu == "mask":
            return tuple(map(self._bits_apart, forward.groups.relu_masks))
        return self._bits_apart(forward.relu_mask)

    def _bits_apart(self, bits: ReluMask | None) -> Any:
        return bits and bits._make(self._apart(part) if hasattr(part, "dtype") else part for part in bits)

    def _of_statistics(self, name: Literal["count", "mean", "var", "invstd"]) -> Any:
        """The statistics of this name: of the batch, or of all groups."""
        forward = self._forward
        if forward.groups is None:
            return self._apart(getattr(forward.statistics, name))
        backend = forward.layouts.backend
        rows = stacked(name, forward.groups.statistics, backend)
        of_all = rows.reshape(-1) if name == "count" else rows
        return of_all if backend.device is None else backend.device.as_users(of_all)

    def _apart(self, array: BackendArray) -> Any:
        """The array for others."""
        forward = self._forward
        return forward.layouts.backend.apart(array, forward.statistics)


keep: Callable[[Saved[Any], Forward], None] = Saved.__dict__["_forward"].__set__
"""Give a new Saved what it holds, which it keeps for good."""
