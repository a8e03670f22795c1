"""The exception types, and the shape of every message a user sees."""

from __future__ import annotations

from collections.abc import Callable


class BackendUnavailable(RuntimeError):
    """The device has no usable backend here; the message says which command or setting mends it."""


class CollectiveMismatch(ValueError):
    """The ranks of a communicator do not do the same thing; raised on every rank, with who said what.

    A rank that failed on its own raises its own error, and the others this one. Nothing was changed on any of them.
    """


class StateWarning(UserWarning):
    """Running statistics hold a NaN or an infinity: raised where they come into a state."""


def message(
    function: str,
    argument: str,
    rule: str,
    got: object,
    remedy: str = "",
    *,
    shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    device: tuple[int, int] | str | None = None,
) -> str:
    """`<function>: <argument> must <rule>; got <value> (shape=…, dtype=…, device=…). <remedy>`, of the facts given."""
    place = device_name(device) if isinstance(device, tuple) else device
    facts = [
        f"{name}={value}"
        for name, value in (("shape", shape), ("dtype", dtype), ("device", place))
        if value is not None
    ]
    known = f" ({', '.join(facts)})" if facts else ""
    text = got if isinstance(got, str) else _written(got, str)
    return f"{function}: {argument} must {rule}; got {text}{known}." + (f" {remedy}" if remedy else "")


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
