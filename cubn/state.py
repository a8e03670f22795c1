"""BatchNormState: the parameters, running statistics and options of one batch normalisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays
from cubn._arguments import dtype_name, flag, on_host, stored
from cubn._arrays import Array
from cubn._state import modules
from cubn._state.arrays import ARRAYS, check_on_host, described, filled, placed, summary
from cubn._state.attributes import Attributes
from cubn._state.counted import COUNTERS, counted
from cubn._state.entries import checked_entries
from cubn._state.options import DTYPES, OPTIONS, STATE, checked_momentum, checked_options
from cubn._types import COUNTS, FLOATS
from cubn.errors import message, reporting_as
from cubn.typing import DType, RunningVariance, SupportsDLPack


class BatchNormState(Attributes):
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
        Weight of the new value, 0 to 1. None: the cumulative average, every batch with equal weight. Without running
        statistics it has no use, and may be any number.
    affine : bool
        Whether there are gamma (ones) and beta (zeros).
    track : bool
        Whether there are running_mean (zeros), running_var (ones) and counters.
    channel_axis : int
        The channels' axis in x; may be negative.
    dtype : {"float32", "float64"}
        Of the arrays; NumPy's and PyTorch's own names for them do, too. float32 serves x of every dtype; float64 is for
        float64 x.
    like : array, optional
        The state's arrays are made by this array's library, on its device; by NumPy without it.
    running_variance : {"unbiased", "biased"}
        Which variance of a batch running_var averages: m2 / (count - 1), as in PyTorch, or m2 / count, as in Keras,
        Flax, Haiku and ONNX.

    Attributes
    ----------
    gamma, beta, running_mean, running_var : array of shape (C,), or None
        May be assigned to: arrays of any library on one device, used in place. The running statistics are written in
        place where their library allows it, and else replaced by new arrays.
    tracked, skipped : numpy.ndarray of int64, shape (C,), or None
        Per channel: updates seen; and how many of these left the running statistics as they were, because the batch's
        statistics or the new values were not finite, or the channel had fewer than two values. 1 and 0 again where a
        cumulative average begins anew because the running statistics were not finite. What is read is a read-only copy;
        on a CUDA device, reading waits for it. An int, or an int64 array of any library, may be assigned, and is
        copied.

    Raises
    ------
    TypeError, ValueError
        If an option or an array does not fit; the message says what is asked for.

    Warns
    -----
    StateWarning
        If running statistics that come in hold a NaN or an infinity, on the host.

    Notes
    -----
    One state may be used by several threads: what updates it takes turns, a whole `forward_train` without `comm=`
    included, also after a fork. What interrupts an update in its own thread (a signal handler, a `__del__`) can neither
    update, copy nor store the state: a RuntimeError. `copy.copy`, `copy.deepcopy` and pickle copy the arrays, in their
    own libraries.

    A variance in 16 bits stalls at small momenta: running statistics of 16 bits are read, but not updated.

    A negative running_var is a ValueError where it comes in, on the host; a device is not waited for. What is written
    into the arrays later is not looked at, and `forward` gives what IEEE arithmetic makes of the formula: NaN where
    running_var + eps is below 0 or NaN, gamma * inf where it is 0. `repr` names such channels.
    """

    __slots__ = ()

    @reporting_as(STATE)
    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track: bool = True,
        channel_axis: int = 1,
        dtype: DType = "float32",
        like: SupportsDLPack | None = None,
        running_variance: RunningVariance = "unbiased",
    ) -> None:
        dtype = dtype_name(dtype, DTYPES)
        place = _described_like(like)
        fills = {"gamma": 1, "beta": 0} if flag(affine, "affine") else {}
        if flag(track, "track"):
            fills |= {"running_mean": 0, "running_var": 1}
        momentum = checked_momentum(momentum, used=track)
        options = checked_options(num_features, eps, momentum, channel_axis, running_variance)
        self._begin(options, {name: filled(options.num_features, fills[name], dtype, place) for name in fills})

    @classmethod
    @reporting_as(STATE)
    def from_arrays(
        cls,
        *,
        gamma: SupportsDLPack | None = None,
        beta: SupportsDLPack | None = None,
        running_mean: SupportsDLPack | None = None,
        running_var: SupportsDLPack | None = None,
        num_features: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        channel_axis: int = 1,
        running_variance: RunningVariance = "unbiased",
        tracked: int | SupportsDLPack | None = None,
        skipped: int | SupportsDLPack | None = None,
        check: bool = True,
    ) -> Self:
        """A state of existing arrays, used in place: a framework module's own parameters and buffers, say.

        Parameters
        ----------
        gamma, beta : array of shape (C,), optional
            float16, bfloat16, float32 or float64, of any library. Never written; one that requires a gradient is read
            all the same.
        running_mean, running_var : array of shape (C,), optional
            Of the same dtypes, of any library; both or neither. Written by updates, which need float32 or float64.
        num_features : int, optional
            Channels, C; needed where there are no arrays.
        eps, momentum, channel_axis, running_variance
            As in `BatchNormState`.
        tracked, skipped : int or array of int64, optional
            How many batches the running statistics have seen, and how many of them passed over; copied. 0 without them.
            With `momentum=None` they say what the statistics weigh beside the next batch.
        check : bool
            Whether running statistics on the host are looked at. With False a negative variance is no error, and a NaN
            no warning: for states that are to be examined or repaired.

        Returns
        -------
        BatchNormState

        Raises
        ------
        TypeError
            If an array is not one, or of another dtype.
        ValueError
            If shapes or devices differ, only one of running_mean and running_var is given, one of them shares memory
            with another array, a running_var is negative, or counters do not fit.
        """
        arrays = _present(gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
        momentum = checked_momentum(momentum, used=running_mean is not None)
        counters = _present(tracked=tracked, skipped=skipped)
        return cls._of(arrays, num_features, counters, check, eps, momentum, channel_axis, running_variance)

    @classmethod
    @reporting_as(STATE)
    def from_module(cls, bn: Any, *, check: bool = True) -> Self:
        """A state of the parameters and buffers of a PyTorch batch norm, used in place, with its options.

        Parameters
        ----------
        bn : torch.nn.BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm
            With or without parameters, with or without running statistics. `num_batches_tracked` is read once.
        check : bool
            As in `from_arrays`.

        Returns
        -------
        BatchNormState

        Raises
        ------
        TypeError
            If bn is another module, or one without parameters yet.
        ValueError
            As in `from_arrays`.

        Notes
        -----
        The state holds the tensors the module has now. Where the module gets others (`load_state_dict(assign=True)`,
        `to_empty`, an assigned `running_mean`) the state keeps the old ones: make it afterwards. It counts in
        `tracked`, and leaves `num_batches_tracked` alone. A momentum that is no weight is an error of the first update.
        `copy.deepcopy` of a model that holds both leaves its copies joined; of the module alone, or by pickle, not.
        """
        arguments = modules.of_torch(bn)
        arrays = _present(**{name: arguments.pop(name) for name in ARRAYS})
        counters = _present(tracked=arguments.pop("tracked"))
        return cls._of(arrays, arguments.pop("num_features"), counters, check, **arguments)

    @classmethod
    @reporting_as("from_dict")
    def from_dict(cls, d: Mapping[str, Any], *, like: SupportsDLPack | None = None, check: bool = True) -> Self:
        """The state that `to_dict` wrote down, in arrays of its own.

        Parameters
        ----------
        d : mapping
            As from `to_dict`, or from what stored it: `numpy.load`, `torch.load`, `json.load` of lists.
        like : array, optional
            The state's arrays are made by this array's library, on its device; by NumPy without it.
        check : bool
            As in `from_arrays`.

        Returns
        -------
        BatchNormState

        Raises
        ------
        KeyError
            If an entry is missing.
        TypeError, ValueError
            If an entry does not fit, or is none of a state's.
        """
        found, place = checked_entries(d), _described_like(like)
        with reporting_as(STATE):
            arrays = {name: stored(found[name], name, FLOATS) for name in ARRAYS if name in found}
            counters = {name: stored(found[name], name, COUNTS) for name in COUNTERS if name in found}
            if flag(check, "check"):  # before they are on a device
                check_on_host({name: described(array, name) for name, array in arrays.items()})
            arrays = {name: placed(array, place) for name, array in arrays.items()}
            options = (found.get("momentum"), found["channel_axis"], found.get("running_variance", "unbiased"))
            return cls._of(arrays, found["num_features"], counters, False, found["eps"], *options)

    @reporting_as("to_dict")
    def to_dict(self, *, like: SupportsDLPack | None = None) -> dict[str, Any]:
        """Everything the state holds, as plain numbers, words and arrays of its own.

        `np.savez(path, **state.to_dict())` and `torch.save(state.to_dict(like=tensor), path)` store it so that
        `np.load(path)` and `torch.load(path)` read it without pickled objects, for `from_dict`.

        Parameters
        ----------
        like : array, optional
            The arrays are made by this array's library, on its device; by NumPy without it.

        Returns
        -------
        dict
            num_features, eps, momentum, channel_axis, running_variance; gamma, beta, running_mean, running_var, tracked
            and skipped, each an array of shape (C,). What the state does not have is left out, `momentum=None` too. A
            bfloat16 array comes as float32, which holds it exactly.
        """
        place = _described_like(like)
        with self._turn():
            held = self._describe(self._arrays)
            arrays = {name: on_host(array) for name, array in held.items()} | self._counts()
        return _present(**self._options._asdict()) | {name: placed(arrays[name], place) for name in arrays}

    def copy(self) -> Self:
        """A state with copies of the arrays, in their own libraries."""
        return copy.copy(self)

    @reporting_as("reset")
    def reset(self, *, statistics: bool = True, counters: bool = True) -> None:
        """Begin anew: running_mean 0 and running_var 1, as in a new state, and no updates counted.

        Parameters
        ----------
        statistics : bool
            Whether running_mean and running_var are set: in place, or replaced where their library is immutable.
        counters : bool
            Whether tracked and skipped are set to 0. Before statistics are taken anew with `momentum=None` they must
            be, or the new batches weigh no more than those before. (`recalibrate` needs no reset.)

        Raises
        ------
        ValueError
            If the state has no running statistics, or they cannot be written.
        TypeError
            If they are of 16 bits.
        """
        flag(statistics, "statistics")
        flag(counters, "counters")
        with self._turn():
            self._check_updatable()
            if statistics:
                self._move_to_zero_and_one()
            if counters and self._counters:
                self._counters = counted(self._counters.place, self._no_counts())

    def __repr__(self) -> str:
        channels, eps, momentum, axis, variance = self._options
        options = [str(channels), f"eps={eps}", f"momentum={momentum}", f"channel_axis={axis}"]
        if variance != "unbiased":
            options.append(f"running_variance={variance!r}")
        holds = summary(self._arrays)
        if self._counters and self._counters.device is None:
            holds += [f"{name} {_span(counts)}" for name, counts in self._counts().items()]
        return f"{STATE}({', '.join(options)}; {'; '.join(holds) or 'no arrays'})"

    def __getstate__(self) -> dict[str, Any]:
        return self._copied({})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of a model that holds a module and its state, the copy's state has the arrays of the copy's module."""
        state = type(self).__new__(type(self))
        state.__setstate__(self._copied(memo))
        return state

    @reporting_as("copy")
    def _copied(self, memo: dict[int, Any]) -> dict[str, Any]:
        """All there is, copied at one moment."""
        with self._turn():
            return {"arrays": copy.deepcopy(self._arrays, memo), **self._options._asdict(), **self._counts()}

    @reporting_as(STATE)
    def __setstate__(self, state: dict[str, Any]) -> None:
        options = checked_options(*(({"running_variance": "unbiased"} | state)[name] for name in OPTIONS))
        counters = _present(**{name: state.get(name) for name in COUNTERS})
        self._begin(options, _present(**{name: state["arrays"].get(name) for name in ARRAYS}), counters, check=False)

    @classmethod
    def _of(
        cls,
        arrays: dict[str, Any],
        num_features: int | None,
        counters: dict[str, Any],
        check: bool,
        eps: float,
        momentum: float | None,
        channel_axis: int,
        running_variance: RunningVariance = "unbiased",
    ) -> Self:
        """A state of arrays."""
        flag(check, "check")
        if num_features is None:
            if not arrays:
                raise ValueError(message("num_features", "be given where there are no arrays", None))
            name, array = next(iter(arrays.items()))
            num_features = math.prod(described(array, name).shape)
        self = cls.__new__(cls)
        options = checked_options(num_features, eps, momentum, channel_axis, running_variance)
        self._begin(options, arrays, counters, check=check)
        return self


def checked_state(state: Any) -> BatchNormState:
    """state, if it is one."""
    if not isinstance(state, BatchNormState):
        remedy = "BatchNormState.from_module makes one of a torch batch norm, from_arrays of any arrays."
        raise TypeError(message("state", "be a BatchNormState", type(state).__name__, remedy))
    return state


def _described_like(like: Any) -> Array | None:
    return None if like is None else _arrays.describe(like, "like", detach=True)


def _present(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _span(counts: NDArray[np.int64]) -> str:
    """`3`, or `2 to 3` where channels differ."""
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"
