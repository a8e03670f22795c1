"""BatchNormState: the parameters, running statistics and options of one batch normalisation."""

from __future__ import annotations

import copy
import math
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays
from cubn._arguments import Region, backend, refusal, region, whole
from cubn._arrays import FLOATS, Array
from cubn._layout import vector
from cubn.backends import CPU, Affine, Backend, BackendArray, Running, Vector
from cubn.errors import device_name, message

Int64 = NDArray[np.int64]

STATISTICS = ("running_mean", "running_var")
ARRAYS = ("gamma", "beta", *STATISTICS)

_OPTIONS = ("num_features", "eps", "momentum", "channel_axis")
_COUNTERS = ("tracked", "skipped")
_NAME = "BatchNormState"


class Held(NamedTuple):
    """A state's arrays, on one device, and the same as kernels see them."""

    arrays: dict[str, Array]
    regions: tuple[Region, ...]
    device: tuple[int, int] | None
    fixed: bool  # nothing moves or converts the arrays
    affine: Affine
    running: tuple[Vector, Vector] | None  # mean and variance


class _Attribute:
    """An attribute whose array is checked and looked at when it is assigned."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, state: BatchNormState | None, owner: type) -> Any:
        return self if state is None else state._arrays[self._name]

    def __set__(self, state: BatchNormState, array: Any) -> None:
        state._assign(**{self._name: array})


class BatchNormState:
    """The parameters, running statistics and options of one batch normalisation (Ioffe & Szegedy 2015).

    y = (x - mean) / sqrt(var + eps) * gamma + beta, with running statistics in `forward` and a batch's own in
    `forward_train`, which then updates: running = (1 - momentum) * running + momentum * batch.

    Parameters
    ----------
    num_features : int
        Channels, C.
    eps : float
        Added to the variance; positive. In the units of x squared.
    momentum : float or None
        Weight of the new value, 0 to 1. None: the cumulative average, every batch with equal weight.
    affine : bool
        Whether there are gamma (ones) and beta (zeros).
    track : bool
        Whether there are running_mean (zeros), running_var (ones) and counters.
    channel_axis : int
        The channels' axis in x; may be negative.
    dtype : {"float32", "float64"}
        Of the arrays. float32 serves x of every dtype; float64 is for float64 x.
    like : array, optional
        The state's arrays are made by this array's library, on its device; by NumPy without it.

    Attributes
    ----------
    gamma, beta, running_mean, running_var : array of shape (C,), or None
        May be assigned to: arrays of any library on one device, used in place. The running statistics are written in
        place where their library allows it, and else replaced by new arrays. running_var is the unbiased variance.
    tracked, skipped : array of int64, shape (C,), or None
        NumPy's; once running statistics on a CUDA device have been updated, CuPy's beside them.
        Per channel: updates seen; and how many of these left the running statistics as they were, because the batch's
        statistics or the new values were not finite, or the channel had fewer than two values.

    Raises
    ------
    TypeError, ValueError
        If an option or an array does not fit; the message says what is asked for.

    Notes
    -----
    One state may be used by several threads: what updates it takes turns, a whole `forward_train` without `comm=`
    included, also after a fork. `copy.copy`, `copy.deepcopy` and pickle copy the arrays, in their own libraries.

    A variance in 16 bits stalls at small momenta, so running statistics are float32 or float64, always.
    """

    __slots__ = (  # what is not among them, `training` say, cannot be set by mistake
        "__weakref__",
        "_arrays",
        "_channel_axis",
        "_counters_device",
        "_eps",
        "_held",
        "_lock",
        "_momentum",
        "_num_features",
        "skipped",
        "tracked",
    )
    tracked: BackendArray | None
    skipped: BackendArray | None
    _arrays: dict[str, Any]
    _held: Held | None  # as last described, where that may be true for longer
    _lock: threading.Lock
    _counters_device: tuple[int, int]

    gamma = _Attribute()
    beta = _Attribute()
    running_mean = _Attribute()
    running_var = _Attribute()

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track: bool = True,
        channel_axis: int = 1,
        dtype: str = "float32",
        like: Any = None,
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise TypeError(message(_NAME, "dtype", "be 'float32' or 'float64'", repr(dtype)))
        beside = None if like is None else _arrays.describe(like, _NAME, "like", detach=True)
        fills = {"gamma": 1, "beta": 0} if affine else {}
        fills |= {"running_mean": 0, "running_var": 1} if track else {}
        self._begin(num_features, eps, momentum, channel_axis)
        self._assign(**{name: _filled(self.num_features, value, dtype, beside) for name, value in fills.items()})

    @classmethod
    def from_arrays(
        cls,
        *,
        gamma: Any = None,
        beta: Any = None,
        running_mean: Any = None,
        running_var: Any = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        channel_axis: int = 1,
    ) -> Self:
        """A state of existing arrays, used in place: a framework module's own parameters and buffers, say.

        Parameters
        ----------
        gamma, beta : array of shape (C,), optional
            float16, bfloat16, float32 or float64, of any library. Never written; one that requires a gradient is read
            all the same.
        running_mean, running_var : array of shape (C,), optional
            float32 or float64, of any library; both or neither. Written by updates.
        eps, momentum, channel_axis
            As in `BatchNormState`.

        Returns
        -------
        BatchNormState

        Raises
        ------
        TypeError
            If an array is not one, or of another dtype.
        ValueError
            If shapes or devices differ, only one of running_mean and running_var is given, or one of them shares memory
            with another array.
        """
        given = dict(zip(ARRAYS, (gamma, beta, running_mean, running_var), strict=True))
        arrays = {name: array for name, array in given.items() if array is not None}
        if not arrays:
            remedy = f"{_NAME}(num_features, affine=False, track=False) is a state without any."
            raise ValueError(message(_NAME, "arrays", "hold one of them at least", None, remedy))
        name, array = next(iter(arrays.items()))
        shape = _described(array, name).shape
        self = cls.__new__(cls)
        self._begin(math.prod(shape), eps, momentum, channel_axis)
        self._assign(**arrays)
        return self

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """The state that `to_dict` wrote down, in NumPy arrays of its own.

        Parameters
        ----------
        d : mapping
            As from `to_dict`, or from what stored it.

        Returns
        -------
        BatchNormState

        Raises
        ------
        KeyError
            If an entry is missing.
        TypeError, ValueError
            If an entry does not fit.
        """
        self = cls.__new__(cls)
        if missing := [name for name in (*_OPTIONS, *ARRAYS, *_COUNTERS) if name not in d]:
            remedy = "For arrays of another origin there is from_arrays."
            raise KeyError(message("from_dict", "d", "have every entry of to_dict", f"no {', '.join(missing)}", remedy))
        plain = {name: _plain(value) for name, value in d.items()}
        self._begin(*(plain[name] for name in _OPTIONS))
        self._assign(**{name: np.array(plain[name]) for name in ARRAYS if plain[name] is not None})
        if self.tracked is not None:
            self._place_counters(self._counters_device, plain)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Everything the state holds, as plain numbers and NumPy arrays of its own.

        Returns
        -------
        dict
            num_features, eps, momentum, channel_axis; gamma, beta, running_mean, running_var, tracked, skipped (each an
            array of shape (C,) or None). A bfloat16 parameter comes as float32, which holds it exactly.
        """
        with self._lock:
            described = self._describe(self._arrays, "to_dict")
            arrays = dict.fromkeys(ARRAYS) | {name: a.library.to_numpy(a) for name, a in described.items()}
            counters = self._counters()
        return {**self._options(), **arrays, **counters}

    def copy(self) -> Self:
        """A state with copies of the arrays, in their own libraries."""
        return copy.copy(self)

    @property
    def num_features(self) -> int:
        """Channels, C."""
        return self._num_features

    @property
    def eps(self) -> float:
        """Added to the variance."""
        return self._eps

    @eps.setter
    def eps(self, eps: float) -> None:
        self._eps = checked_eps(eps, _NAME)

    @property
    def momentum(self) -> float | None:
        """Weight of the new value in the running statistics; None for the cumulative average."""
        return self._momentum

    @momentum.setter
    def momentum(self, momentum: float | None) -> None:
        if momentum is not None:
            momentum = _number(momentum, _NAME, "momentum")
            if not 0 <= momentum <= 1:
                raise ValueError(
                    message(_NAME, "momentum", "be None or from 0 to 1, the weight of the new value", momentum)
                )
        self._momentum = momentum

    @property
    def channel_axis(self) -> int:
        """The channels' axis in x."""
        return self._channel_axis

    @channel_axis.setter
    def channel_axis(self, channel_axis: int) -> None:
        self._channel_axis = whole(channel_axis, _NAME, "channel_axis")

    def _read(self, function: str, x: Array) -> Held:
        """The arrays, for an operation on x; they stay alive with the result.

        A framework may have moved or converted them since they were assigned.
        """
        held = self._current(function)
        if held.device not in (None, x.device):
            rule = f"be on the state's device, {device_name(held.device)}"
            raise ValueError(refusal(function, "x", rule, x, "Move one of them to the other's device."))
        return held

    def _check_updatable(self, function: str, held: Held | None = None) -> None:
        """Raise unless the running statistics (those held) can be written, or replaced."""
        if self.tracked is None:
            remedy = "Make the state with track=True."
            raise ValueError(message(function, "state", "have running statistics", "a state with track=False", remedy))
        held = held or self._current(function)
        for name in STATISTICS:
            array = held.arrays[name]
            if array.library.fixed and not array.library.unchanged(array):  # others were compared when they were read
                array = _described(array.owner, name, function)
            if not array.library.immutable:
                _arrays.check_writable(array, function, name)

    def _place(self, function: str) -> Backend:
        """Where the running statistics are updated when there is no x to say so."""
        mean = self._current(function).arrays["running_mean"]
        return backend(mean.device, mean.library.name)

    @contextmanager
    def _moving(self, function: str, held: Held | None = None) -> Iterator[Running]:
        """The running statistics (those held, if they still are), for a backend to move while nobody else does.

        `_check_updatable` has passed. What was written becomes the state's unless an error is raised.
        """
        with self._lock:
            if held is None or held is not self._held:
                held = self._current(function)
            arrays = [held.arrays[name] for name in STATISTICS]
            fresh = [_arrays.empty_vector(a.shape[0], a.dtype, a) if a.library.immutable else None for a in arrays]
            mean, var = (vector(array) for array in arrays)
            new_mean, new_var = (vector((f and f.array) or a) for f, a in zip(fresh, arrays, strict=True))
            if self._counters_device != held.device:
                self._place_counters(arrays[0].device, self._counters())
            counters: tuple[BackendArray, BackendArray] = (self.tracked, self.skipped)
            if any(fresh):  # whose adoption may fail: nothing moves before all of it can
                counters = (counters[0].copy(), counters[1].copy())
            yield Running((mean, var), (new_mean, new_var), *counters, self._momentum)
            changed = {name: output.finish() for name, output in zip(STATISTICS, fresh, strict=True) if output}
            if changed:
                self._arrays = self._arrays | changed
                self.tracked, self.skipped = counters
            for array, output in zip(arrays, fresh, strict=True):
                if output is None:
                    array.library.mark_written(array)

    def __repr__(self) -> str:
        return (
            f"{_NAME}({self.num_features}, eps={self.eps}, momentum={self.momentum}, gamma={self.gamma is not None}, "
            f"beta={self.beta is not None}, track={self.tracked is not None}, channel_axis={self.channel_axis})"
        )

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            arrays = copy.deepcopy(self._arrays)
            counters = self._counters()
        return {"arrays": arrays, **self._options(), **counters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(*(state[name] for name in _OPTIONS))
        self._assign(**state["arrays"])
        if self.tracked is not None:
            self._place_counters(self._counters_device, state)

    def _begin(self, num_features: int, eps: float, momentum: float | None, channel_axis: int) -> None:
        """Options, and no arrays yet."""
        self._num_features = whole(num_features, _NAME, "num_features")
        if self._num_features < 1:
            raise ValueError(message(_NAME, "num_features", "be 1 or more", num_features))
        self.eps = eps
        self.momentum = momentum
        self.channel_axis = channel_axis
        self.tracked = self.skipped = None
        self._counters_device = (CPU, 0)
        self._arrays = dict.fromkeys(ARRAYS)
        self._held = hold({}, _NAME)
        self._lock = threading.Lock()
        _STATES.add(self)

    def _assign(self, **changes: Any) -> None:
        """Take arrays, if they and those already held fit each other."""
        with self._lock:
            arrays = self._arrays | changes
            described = self._describe(arrays, _NAME)
            held = hold(described, _NAME)
            _check_statistics(described)
            self._arrays = arrays
            self._keep(held)
            if "running_mean" in described and self.tracked is None:
                self.tracked, self.skipped = (np.zeros(self.num_features, np.int64) for _ in range(2))

    def _counters(self) -> dict[str, Int64 | None]:
        """Copies of the counters in NumPy."""
        counters = {"tracked": self.tracked, "skipped": self.skipped}
        if self._counters_device[0] == CPU:
            return {name: copy.copy(counter) for name, counter in counters.items()}
        place = backend(self._counters_device)
        return {name: place.to_host(counter) for name, counter in counters.items()}

    def _place_counters(self, device: tuple[int, int], values: Mapping[str, Int64 | None]) -> None:
        """Counters of these values where the running statistics are."""
        place = None if device[0] == CPU else backend(device)
        counters = {}
        for name in _COUNTERS:
            value = np.array(values[name], np.int64)
            if value.shape != (self.num_features,):
                rule = f"have shape ({self.num_features},), one count per channel"
                raise ValueError(message(_NAME, name, rule, value, shape=value.shape))
            counters[name] = place.from_host(value) if place else value
        self.tracked, self.skipped = counters["tracked"], counters["skipped"]
        self._counters_device = device

    def _current(self, function: str) -> Held:
        arrays, held = self._arrays, self._held
        if held is None or not (held.fixed or _is_of(held, arrays)):
            held = hold(self._describe(arrays, function), function)
            self._keep(held)
        return held

    def _keep(self, held: Held) -> None:
        """Remember the description; not a capsule, which would keep memory from an owner who may give it away."""
        self._held = None if any(array.capsule for array in held.arrays.values()) else held

    def _describe(self, arrays: Mapping[str, Any], function: str) -> dict[str, Array]:
        """The arrays there are, each with the state's number of channels."""
        described = {name: _described(a, name, function) for name, a in arrays.items() if a is not None}
        for name, array in described.items():
            if array.shape != (self.num_features,):
                rule = f"have shape ({self.num_features},), one value per channel"
                raise ValueError(refusal(function, name, rule, array))
        return described

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}


def checked_state(state: Any, function: str) -> BatchNormState:
    """state, if it is one."""
    if not isinstance(state, BatchNormState):
        remedy = "BatchNormState.from_arrays makes one of the arrays of a module."
        raise TypeError(message(function, "state", "be a BatchNormState", type(state).__name__, remedy))
    return state


def checked_eps(eps: float, function: str) -> float:
    """eps as a number that can be added to a variance."""
    number = _number(eps, function, "eps")
    if not 0 < number < math.inf:
        raise ValueError(message(function, "eps", "be positive and finite", number))
    return number


def _plain(value: Any) -> Any:
    """A number, or None, that was stored as an array without axes."""
    return value.item() if isinstance(value, np.ndarray) and not value.ndim else value


def _number(value: float, function: str, argument: str) -> float:
    if not isinstance(value, Real):
        raise TypeError(message(function, argument, "be a real number", repr(value)))
    return float(value)


def _filled(C: int, value: float, dtype: str, beside: Array | None) -> Any:
    """A new per-channel array in the library of `beside`, or NumPy's."""
    values = np.full(C, value, dtype)
    return values if beside is None else beside.library.from_numpy(values, dtype, beside)


def _described(array: Any, name: str, function: str = _NAME) -> Array:
    dtypes = ("float32", "float64") if name in STATISTICS else FLOATS
    return _arrays.describe(array, function, name, dtypes, detach=True)


def hold(described: dict[str, Array], function: str) -> Held:
    """Per-channel arrays, all on one device, the running statistics of one dtype."""
    device = None
    for name, array in described.items():
        if device is None:
            first, device = name, array.device
        elif array.device != device:
            rule = f"be on the device of {first}, {device_name(device)}"
            raise ValueError(refusal(function, name, rule, array, "Move one of them to the other's device."))
    mean, var = (described.get(name) for name in STATISTICS)
    if mean and var and mean.dtype != var.dtype:
        remedy = "Convert one of them; from_arrays takes both at once."
        raise TypeError(refusal(function, "running_var", f"have running_mean's dtype {mean.dtype}", var, remedy))
    gamma, beta = (vector(described[name]) if name in described else None for name in ("gamma", "beta"))
    running = (vector(mean), vector(var)) if mean and var else None
    fixed = all(array.library.fixed for array in described.values())
    regions = tuple(region(name, array) for name, array in described.items())
    return Held(described, regions, device, fixed, Affine(gamma, beta), running)


def _is_of(held: Held, arrays: Mapping[str, Any]) -> bool:
    """Whether these arrays were held, and are still as they were."""
    for name, owner in arrays.items():
        array = held.arrays.get(name)
        if array is None:
            if owner is not None:
                return False
        elif array.owner is not owner or not array.library.unchanged(array):
            return False
    return True


def _check_statistics(described: Mapping[str, Array]) -> None:
    """Running statistics come both or neither, and share no memory with another array."""
    held = [name for name in STATISTICS if name in described]
    if len(held) == 1:
        (other,) = set(STATISTICS) - set(held)
        remedy = "Give both for running statistics, or neither."
        raise ValueError(message(_NAME, other, f"be given together with {held[0]}", None, remedy))
    for name in held:
        for other, array in described.items():
            if other != name and _arrays.overlap(described[name], array) != "none":
                remedy = "Pass a copy of one of them."
                raise ValueError(refusal(_NAME, name, f"share no memory with {other}", described[name], remedy))


_STATES: weakref.WeakSet[BatchNormState] = weakref.WeakSet()


def _release_locks() -> None:
    """In a forked child: a lock held by a thread that does not exist here would never be released."""
    for state in list(_STATES):
        state._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks)
