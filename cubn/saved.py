"""What a forward leaves for its backward."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, NoReturn, Self, cast

import numpy as np

from cubn._arguments import Companion, Source, shown
from cubn._arrays import Array
from cubn._given import Parameters
from cubn.backends import BackendArray, Gate, Statistics
from cubn.sync.collective import SyncContext
from cubn.typing import ArrayT_co


class Forward(NamedTuple):
    """What a backward needs of its forward."""

    source: Source
    mask: Companion | None
    has_residual: bool
    statistics: Statistics
    parameters: Parameters
    gate: Gate
    read: tuple[tuple[str, Array, int | None], ...]
    """x and the mask by name, and the versions they had."""
    frozen: Array | None
    """The running mean, where x was normalised by running statistics."""
    overwritten: bool = False
    """Whether y was written over x."""
    place: SyncContext | None = None


def as_read(source: Source, mask: Companion | None) -> tuple[tuple[str, Array, int | None], ...]:
    """x and the mask, and which versions of them."""
    x = source.array
    read = (("x", x, x.library.version(x)),)
    return read if mask is None else (*read, ("mask", mask.array, mask.array.library.version(mask.array)))


class Saved(Generic[ArrayT_co]):
    """What `backward` needs from the forward that returned it.

    Holds a reference to x (and to the mask), and copies of everything else, so that later updates of the state do not
    change a backward. May be used several times. x (and the mask) must stay as they are until the last of them: a
    PyTorch tensor that was changed in place is noticed, a change of another library's array is not.

    Only a forward makes one, and nothing changes it: what it gives out are copies (on a CUDA device, views).

    Attributes
    ----------
    x : array
        As given.
    count : int64 array of shape ()
        Values per channel; 0 where the statistics were frozen.
    mean, var, invstd : float64 arrays of shape (C,)
        The statistics x was normalised by; invstd = 1 / sqrt(var + eps).
    relu_bits : object or None
        After a residual and a ReLU: which elements of y are positive or NaN, at one bit an element, packed as suits the
        backend. Without a residual they are recomputed from x, and nothing of the input's size is kept.
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
        object.__setattr__(self, "_forward", forward)
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
        of = "running statistics" if forward.frozen else "its own statistics"
        gamma, beta = forward.parameters
        parts = {
            "x": forward.source.array,
            "gamma": gamma and gamma.home,
            "beta": beta and beta.home,
            "mask": forward.mask and forward.mask.array,
        }
        arrays = ", ".join(f"{name}={shown(array)}" for name, array in parts.items())
        return (
            f"Saved({arrays}, residual={forward.has_residual}, relu={forward.gate.kind != 'none'}, normalised by {of})"
        )

    @property
    def x(self) -> ArrayT_co:
        return cast(ArrayT_co, self._forward.source.array.owner)

    @property
    def count(self) -> Any:
        return _apart(self._forward.statistics.count)

    @property
    def mean(self) -> Any:
        return _apart(self._forward.statistics.mean)

    @property
    def var(self) -> Any:
        return _apart(self._forward.statistics.var)

    @property
    def invstd(self) -> Any:
        return _apart(self._forward.statistics.invstd)

    @property
    def relu_bits(self) -> Any:
        bits = self._forward.gate.bits
        return bits and bits._make(_apart(part) if hasattr(part, "dtype") else part for part in bits)


def _apart(array: BackendArray) -> BackendArray:
    """The array for others: whatever they do to it, the memory that a backward reads stays."""
    return array.copy() if isinstance(array, np.ndarray) else array.view()
