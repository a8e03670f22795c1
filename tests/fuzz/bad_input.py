"""What nobody should pass, given to every argument, constructor and attribute, and then used.

A case is drawn together with the errors it has to meet. Anything else is a fault: another error, none, a crash; and so
is a change of any array or state behind a call that was refused. Half of the calls are made after a good one, which
leaves a short way behind.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import cubn
from tests.fuzz import producer, weird
from tests.fuzz.weird import EITHER, Weird
from tests.fuzz.world import C, World, use, world

_MESSAGE = re.compile(r"^['\"]?[\w.]+: .*\b(must|no|needs?|cannot|is|has)\b", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """A target, and what is passed instead of what it asks for: pairs of an argument and the name of a weird value."""

    target: str
    bad: tuple[tuple[str, str], ...]
    beside: tuple[str, ...] = ()  # valid options that are given too
    known: bool = False  # whether the same was called before with all that it asks for


# --- what is called, and the roles of its arguments -------------------------------------------------------------------

ON_X = {"mask": weird.MASK, "residual": weird.BESIDE, "relu": weird.FLAG, "out": weird.OUT}
TOGETHER = {"comm": weird.COMMUNICATOR, "sizes": weird.SIZES}
TRAINING = {"update": weird.FLAG, "groups": weird.GHOST, "on_single": weird.WORD, "renorm": weird.RENORM}
STATE = {"state": weird.OBJECT}
CHANNELS_OF_X = {"x": weird.CHANNELS}
OPTIONS = {
    "eps": weird.EPS,
    "momentum": weird.MOMENTUM,
    "channel_axis": weird.INTEGER,
    "running_variance": weird.WORD,
}
VECTORS = {
    "gamma": weird.PARAMETER,
    "beta": weird.PARAMETER,
    "running_mean": weird.RUNNING,
    "running_var": weird.RUNNING_VAR,
}
GIVEN = {name: {n: w for n, w in role.items() if n != "None"} for name, role in VECTORS.items()}

Call = Callable[..., Any]
ROLES: dict[str, dict[str, dict[str, Weird]]] = {
    "forward": CHANNELS_OF_X | STATE | ON_X,
    "forward_train": CHANNELS_OF_X | STATE | ON_X | TOGETHER | TRAINING,
    "forward_train_start": CHANNELS_OF_X | STATE | ON_X | TOGETHER | TRAINING,
    "forward_frozen": CHANNELS_OF_X | STATE | ON_X | TOGETHER,
    "normalize": CHANNELS_OF_X
    | {"moments": weird.OBJECT, "gamma": weird.PARAMETER, "beta": weird.PARAMETER}
    | {"eps": weird.EPS, "channel_axis": weird.AXIS}
    | ON_X,
    "moments": {"x": weird.X, "mask": weird.MASK, "channel_axis": weird.AXIS, "start": weird.START}
    | {"dtype": weird.DTYPE}
    | TOGETHER,
    "backward": {
        "dy": weird.BESIDE | weird.NOTHING,
        "saved": weird.OBJECT,
        "out": weird.OUT,
        "parameter_gradients": weird.WORD,
        "statistics": weird.FLAG,
    },
    "backward_from": {
        "dy": weird.BESIDE | weird.NOTHING,
        "x": weird.CHANNELS,
        **dict.fromkeys(("mean", "invstd"), weird.PARAMETER | weird.NOTHING),
        **dict.fromkeys(("gamma", "beta"), weird.PARAMETER),
        "mask": weird.MASK,
        **dict.fromkeys(("relu", "frozen", "statistics"), weird.FLAG),
        "count": {name: w for name, w in weird.COUNT.items() if name not in ("None", str(2**62))},
        "channel_axis": weird.AXIS,
        "out": weird.OUT,
    },
    "double_backward": {
        "ddx": weird.BESIDE,
        **dict.fromkeys(("ddgamma", "ddbeta"), weird.PARAMETER),
        "dy": weird.BESIDE | weird.NOTHING,
        "saved": weird.OBJECT,
        "parameter_gradients": weird.WORD,
    },
    "finite_mask": {"x": weird.X, "channel_axis": weird.AXIS},
    "from_statistics": {
        "count": weird.COUNT,
        "mean": weird.PARAMETER | weird.NOTHING,
        "var": weird.PARAMETER | weird.NOTHING | {"negative": Weird(lambda a: -a - 1, weird.RANGE)},
    },
    "reset": dict.fromkeys(("statistics", "counters"), weird.FLAG),
    "from_module": {"bn": weird.OBJECT},
    "backward_start": {"dy": weird.BESIDE, "saved": weird.OBJECT},
    "update": STATE | {"moments": weird.OBJECT},
    "fold": STATE,
    "fold_into": STATE
    | {
        "weight": {n: w for n, w in weird.X.items() if n not in weird.WITH_GRADIENT and n != "shape (4,)"},
        "bias": weird.PARAMETER,
        "output_axis": weird.AXIS,
        "groups": weird.GROUPS,
    },
    "merge": {"other": weird.OBJECT},
    "set_num_threads": {"n": weird.THREADS},
    "BatchNormState": OPTIONS
    | {
        "num_features": weird.FEATURES,
        "affine": weird.FLAG,
        "track": weird.FLAG,
        "dtype": weird.DTYPE,
        "like": {n: w for n, w in weird.PARAMETER.items() if not n.startswith("shape")},
    },
    "from_arrays": GIVEN
    | OPTIONS
    | {name: {n: w for n, w in weird.COUNTER.items() if n != "None"} for name in ("tracked", "skipped")}
    | {"num_features": {n: w for n, w in weird.FEATURES.items() if n != "None"}, "check": weird.FLAG},
    "from_dict": OPTIONS
    | {"num_features": weird.FEATURES, "d": weird.OBJECT}
    | {name: weird.COUNTER | {"a list": Weird(lambda a: [0] * C, EITHER)} for name in ("tracked", "skipped")}
    | {name: {n: Weird(w.make, EITHER + w.raises) for n, w in role.items()} for name, role in VECTORS.items()},
    "__setstate__": {},
    "moments.from_dict": {},
    "state": VECTORS
    | OPTIONS
    | {"tracked": weird.COUNTER, "skipped": weird.COUNTER, "num_features": weird.FEATURES}
    | {"training": weird.FLAG, "weight": weird.PARAMETER},
    "changed": {name: weird.CHANGED_RUNNING if name.startswith("running") else weird.CHANGED for name in VECTORS},
    "saved": {},
    "Moments": {},
    "Gradients": {},
    "DoubleGradients": {},
    "StatisticsGradients": {},
}
DEFAULTS: dict[str, tuple[str, ...]] = {
    "forward": ("x", "state"),
    "forward_train": ("x", "state"),
    "forward_train_start": ("x", "state", "comm"),
    "forward_frozen": ("x", "state"),
    "normalize": ("x", "moments"),
    "moments": ("x",),
    "backward": ("dy", "saved"),
    "backward_from": ("dy", "x", "mean", "invstd"),
    "double_backward": ("dy", "saved"),
    "finite_mask": ("x",),
    "from_statistics": ("count", "mean", "var"),
    "backward_start": ("dy", "saved"),
    "update": ("state", "moments"),
    "fold": ("state",),
    "fold_into": ("weight", "bias", "state"),
    "from_arrays": ("gamma", "beta", "running_mean", "running_var"),
}
KNOWN = ("forward", "forward_train", "forward_frozen", "normalize", "moments", "backward", "backward_from", "update")
KNOWN += ("state",)
"""What is called at every step, or lent to what is."""
CLASSES = {
    "saved": cubn.Saved,
    "Moments": cubn.Moments,
    "Gradients": cubn.Gradients,
    "DoubleGradients": cubn.DoubleGradients,
    "StatisticsGradients": cubn.StatisticsGradients,
}
RESULTS = tuple(CLASSES)
APART = {"x", "dtype"}, {"groups", "renorm"}, {"check", "running_var"}
"""One of two may refuse the other, or let it pass."""


def _public(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


def _of_objects() -> None:
    """Nothing of what operations return can be set to anything."""
    values = {name: Weird(w.make, (AttributeError, *w.raises)) for name, w in weird.OBJECT.items()}
    values |= {name: Weird(w.make, (AttributeError, TypeError)) for name, w in weird.COUNTER.items()}
    for target, kind in CLASSES.items():
        ROLES[target] = dict.fromkeys(_public(kind), values)
    anything = {name: Weird(w.make, EITHER + w.raises) for name, w in (weird.OBJECT | weird.COUNTER).items()}
    for target in ("__setstate__", "moments.from_dict"):
        ROLES[target] = {f"leaf {i}": anything for i in range(12)}


_of_objects()
TARGETS = list(ROLES)
VALUES = {(target, name): list(values) for target, roles in ROLES.items() for name, values in roles.items()}


def draw(rng: random.Random) -> Case:
    target = rng.choice(TARGETS)
    roles = ROLES[target]
    names = rng.sample(list(roles), min(len(roles), rng.choice([1, 1, 1, 2])))
    alone = target in ("state", "changed", "__setstate__", "moments.from_dict", *RESULTS)
    if alone or any(pair <= {*names} for pair in APART):
        names = names[:1]
    bad = tuple((name, rng.choice(VALUES[target, name])) for name in names)
    optional = [n for n in ("mask", "residual", "out", "beta", "gamma") if n in roles and n not in names]
    if target in ("from_arrays", "from_dict", "state"):
        optional = []
    beside = tuple(n for n in optional if rng.random() < 0.2)
    return Case(target, bad, beside, known=target in KNOWN and rng.random() < 0.5)


# --- running a case ---------------------------------------------------------------------------------------------------


def run(case: Case) -> None:
    w = world()
    try:
        if case.known:
            _make_known(w, case)
        _judge(w, case, _outcome(w, case), _allowed(case))
    except AssertionError:
        w.renew()
        raise


def _make_known(w: World, case: Case) -> None:
    """Call what is to be called, with what it asks for."""
    if case.target == "state":
        use(w, w.state)
    else:
        given = [name for name, _ in case.bad if name in (*ON_X, *VECTORS) and hasattr(w, name)]
        _call(w, Case(case.target, (), (*case.beside, *given)))
    w.renew()


def _outcome(w: World, case: Case) -> Exception | None:
    """What is raised."""
    try:
        _TARGETS.get(case.target, _call)(w, case)
    except Exception as error:
        return error
    w.renew()
    return None


def _judge(w: World, case: Case, error: Exception | None, allowed: tuple[Any, ...]) -> None:
    if error is None:
        assert None in allowed, f"accepted, not refused by {_names(allowed)}"
        return
    if not isinstance(error, tuple(kind for kind in allowed if kind)):
        raise AssertionError(f"{type(error).__name__} instead of {_names(allowed)}") from error
    if isinstance(error, (TypeError, ValueError)) and case.target not in (*RESULTS, "__setstate__"):
        assert _MESSAGE.match(str(error)), f"not a message of cubn's: {error}"
    if w.changed():
        raise AssertionError("refused, but something was changed") from error


def _allowed(case: Case) -> tuple[Any, ...]:
    """What may be raised; None where nothing may be."""
    found: list[Any] = []
    values = [ROLES[case.target][name][value] for name, value in case.bad]
    for value in values:
        found += [kind for kind in value.raises if kind]
    if all(not value.raises or None in value.raises for value in values):
        found.append(None)
    names = {name for name, _ in case.bad}
    if case.target in ("backward_start", "forward_train_start") or names & {"sizes", "comm"}:
        found += [ValueError, TypeError]  # which of two things is looked at first
    if case.target == "state" and names & {"num_features", "training", "weight", "tracked", "skipped"}:
        found.append(AttributeError)
        if names & {"training", "weight", "num_features"}:
            found.remove(None) if None in found else None
    if case.target == "state" and "channel_axis" in names:
        found.append(ValueError)  # an axis x does not have, once it is used
    if case.target == "from_dict" and {"None", "a dictionary"} & {value for _, value in case.bad}:
        found += [KeyError, None]  # an entry that is not there, or that stands for nothing
    pairs = ({"channel_axis", "x"}, {"output_axis", "weight"}, {"frozen", "count"}, {"track", "momentum"})
    if any(names >= pair for pair in pairs):
        found.append(None)  # one of them may be right beside the other, or not matter
    if "statistics" in names:
        found.append(ValueError)  # which a forward_train has no gradient by
    if case.target in ("__setstate__", "moments.from_dict"):
        found += [AttributeError, KeyError]
    return tuple(found)


def _names(kinds: tuple[Any, ...]) -> str:
    return ", ".join("no error" if kind is None else kind.__name__ for kind in dict.fromkeys(kinds))


def _value(w: World, case: Case, name: str, value: str, like: Any = None) -> Any:
    """The weird value, made of a copy of the valid one."""
    if like is None:
        like = getattr(w, {"other": "moments", "ddx": "dy", "ddgamma": "gamma", "ddbeta": "beta"}.get(name, name), None)
    good = like.copy() if isinstance(like, np.ndarray) else np.ones(C, np.float32)
    return ROLES[case.target][name][value].make(good)


def _call(w: World, case: Case) -> None:
    target = case.target
    arguments = {name: getattr(w, name) for name in DEFAULTS.get(target, ()) if name != "comm"}
    arguments |= {name: getattr(w, name) for name in case.beside}
    bad = {name: _value(w, case, name, value) for name, value in case.bad}
    if target in RESULTS:
        _set_on_result(w, target, *bad.popitem())
        return
    if target == "forward_train_start" or ("sizes" in bad and "comm" not in bad):
        arguments["comm"] = weird.communicator()
    arguments |= bad
    if target == "fold_into":
        positional = [arguments.pop(name) for name in ("weight", "bias", "state")]
    elif target == "double_backward":
        positional = [arguments.pop(name, None) for name in ("ddx", "ddgamma", "ddbeta", "dy", "saved")]
    else:
        positional = [
            arguments.pop(n) for n in ("dy", "x", "state", "moments", "saved", "other", "n") if n in arguments
        ]
    if target == "BatchNormState":
        made = cubn.BatchNormState(arguments.pop("num_features", C), **arguments)
        use(w, made, changed="channel_axis" in bad)
    elif target == "from_statistics":
        cubn.normalize(w.x, cubn.Moments.from_statistics(**arguments))
    elif target == "from_module":
        use(w, cubn.BatchNormState.from_module(*arguments.values()))
    elif target == "reset":
        w.state.reset(**arguments)
    elif target == "from_arrays":
        use(w, cubn.BatchNormState.from_arrays(**arguments), changed="channel_axis" in bad)
    elif target == "merge":
        w.moments.merge(*positional)
    elif target == "set_num_threads":
        before = cubn.get_num_threads()
        try:
            cubn.set_num_threads(*positional)
        finally:
            cubn.set_num_threads(before)
    else:
        result = getattr(cubn, target)(*positional, **arguments)
        if target.endswith("_start"):
            result.finish()
        _compare(w, case, result, positional, arguments)


def _compare(w: World, case: Case, result: Any, positional: list[Any], arguments: dict[str, Any]) -> None:
    """A value that means something gives what the thing it means gives."""
    meant = {name: ROLES[case.target][name][value] for name, value in case.bad}
    if case.target.endswith("_start") or any(weird.raises or weird.means is None for weird in meant.values()):
        return
    if case.target not in ("normalize", "moments", "forward"):
        return
    result = copy.deepcopy(result) if isinstance(result, np.ndarray) else result
    again = getattr(cubn, case.target)(*positional, **arguments | {name: value.means for name, value in meant.items()})
    if isinstance(result, np.ndarray):
        assert np.array_equal(result, again)
    else:
        assert (result.start, result.stop) == (again.start, again.stop)
        assert np.array_equal(result.mean, again.mean)


def _set_on_result(w: World, target: str, name: str, value: Any) -> None:
    """What an operation returned, with an attribute set: used if that should be possible, and a fault anyway."""
    results = {
        "saved": lambda: w.saved,
        "Moments": lambda: w.moments,
        "Gradients": lambda: cubn.backward(w.dy, w.saved),
        "DoubleGradients": lambda: cubn.double_backward(w.dy, None, None, w.dy, w.saved),
        "StatisticsGradients": lambda: cubn.backward(w.dy, cubn.forward_frozen(w.x, w.state)[1], statistics=True),
    }
    setattr(results[target](), name, value)
    with contextlib.suppress(Exception):
        cubn.backward(w.dy, w.saved)
        cubn.normalize(w.x, w.moments)


def _set_and_use(w: World, case: Case) -> None:
    """An attribute of a state; what is refused leaves the state as it was, what is taken is used."""
    ((name, value),) = case.bad
    good = getattr(w.state, name, None)
    given = _value(w, case, name, value, good)
    try:
        setattr(w.state, name, given)
    except Exception:
        assert np.array_equal(getattr(w.state, name, None), good), "refused, but something was changed"
        raise
    if given is not None and name in ("tracked", "skipped"):
        values = given.store if isinstance(given, producer.Foreign) else np.asarray(given)
        assert np.array_equal(getattr(w.state, name), np.broadcast_to(values, C)), "taken as something else"
    try:
        use(w, w.state)
    except Exception:
        if name not in VECTORS:  # what frameworks move and convert is looked at when it is used
            w.renew()
        else:
            assert w.bytes.tobytes() == w.pristine, "refused, but something was changed"
            w.renew()
        raise


def _change_and_use(w: World, case: Case) -> None:
    """An array that changes in place after a state of it was used."""
    arrays = {name: getattr(w, name).copy() for name in VECTORS}
    state = cubn.BatchNormState.from_arrays(**arrays)
    use(w, state)
    ((name, value),) = case.bad
    ROLES[case.target][name][value].make(arrays[name])
    use(w, state)


def _from_dict(w: World, case: Case) -> None:
    d: Any = dict(w.dict)
    for name, value in case.bad:
        if name == "d":
            d = _value(w, case, name, value)
            break
        d[name] = _value(w, case, name, value, d[name] if isinstance(d[name], np.ndarray) else None)
    use(w, cubn.BatchNormState.from_dict(d))


def _leaves(held: Any) -> list[tuple[Any, Any]]:
    """Where the values of nested dictionaries and lists are: pairs of a container and a key."""
    found = []
    for key in held if isinstance(held, dict) else range(len(held)):
        found.append((held, key))
        if isinstance(held[key], (dict, list)):
            found += _leaves(held[key])
    return found


def _replaced(w: World, case: Case, held: Any) -> Any:
    """The same with one of its leaves replaced."""
    held = copy.deepcopy(held)
    ((name, value),) = case.bad
    leaves = _leaves(held)
    container, key = leaves[int(name.removeprefix("leaf ")) % len(leaves)]
    container[key] = _value(w, case, name, value)
    return held


def _unpickle(w: World, case: Case) -> None:
    state = cubn.BatchNormState.__new__(cubn.BatchNormState)
    state.__setstate__(_replaced(w, case, w.state.__getstate__()))
    use(w, state)


def _moments_of_dict(w: World, case: Case) -> None:
    moments = cubn.Moments.from_dict(_replaced(w, case, w.moments.to_dict()))
    with contextlib.suppress(ValueError):  # moments of nothing, or of other channels
        cubn.normalize(w.x, moments)
        w.moments.merge(moments)


_TARGETS = {
    "state": _set_and_use,
    "changed": _change_and_use,
    "__setstate__": _unpickle,
    "from_dict": _from_dict,
    "moments.from_dict": _moments_of_dict,
}
