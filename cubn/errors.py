"""The exception types, and the shape of every message a user sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class BackendUnavailable(RuntimeError):
    """The device has no usable backend here; the message says which command or setting mends it."""


class CollectiveMismatch(ValueError):
    """The ranks of a communicator do not do the same thing; raised on every rank, with who said what.

    A rank that failed on its own raises its own error, and the others this one. Nothing was changed on any of them.
    """


class StateWarning(UserWarning):
    """Running statistics hold a NaN or an infinity: raised where they come into a state."""


_reporting: ContextVar[str] = ContextVar("reporting", default="cubn")


@contextmanager
def reporting_as(function: str) -> Iterator[None]:
    """Let messages begin with this name, in a `with` block or, as a decorator, in a function.

    What a user calls says its name where it begins to check. What is called meanwhile, out of an array's `__dlpack__`
    or a signal handler, says its own, and this one holds again afterwards. A call that was made before is not checked,
    and says nothing.
    """
    token = _reporting.set(function)
    try:
        yield
    finally:
        _reporting.reset(token)


def reported() -> str:
    """What messages begin with here."""
    return _reporting.get()


def message(
    argument: str,
    rule: str,
    got: object,
    remedy: str = "",
    *,
    function: str | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    device: tuple[int, int] | str | None = None,
) -> str:
    """`<function>: <argument> must <rule>; got <value> (shape=…, dtype=…, device=…). <remedy>`, of the facts given.

    `function` is for what has a name of its own wherever it is called; see `reporting_as`.
    """
    place = device_name(device) if isinstance(device, tuple) else device
    facts = [
        f"{name}={value}"
        for name, value in (("shape", shape), ("dtype", dtype), ("device", place))
        if value is not None
    ]
    known = f" ({', '.join(facts)})" if facts else ""
    text = got if isinstance(got, str) else _written(got, str)
    return f"{function or reported()}: {argument} must {rule}; got {text}{known}." + (f" {remedy}" if remedy else "")


def quoted(value: object) -> str:
    """A value in a message, which may be of any kind and size: as Python writes it, on one line."""
    text = " ".join(line.strip() for line in _written(value, repr).splitlines())
    return text if len(text) <= 80 else f"{text[:77]}..."


def a_type(x: object) -> str:
    """As `a numpy.matrix`, `an int`."""
    name = f"{type(x).__module__.partition('.')[0]}.{type(x).__qualname__}".removeprefix("builtins.")
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def _written(value: object, write: Callable[[object], str]) -> str:
    try:
        return write(value)
    except Exception:  # of an array that was deleted, of an integer with too many digits
        return a_type(value)


def device_name(device: tuple[int, int]) -> str:
    """A DLPack device (type, index) as people write it: `cpu`, `cuda:0`."""
    kind, index = device
    name = {1: "cpu", 2: "cuda"}.get(kind, f"dlpack-{kind}")
    return name if kind == 1 else f"{name}:{index}"
