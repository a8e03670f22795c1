"""Nested mappings, lists and objects, as entries with dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cubn._state.arrays import STATISTICS
from cubn.health.files.pickles import Opaque
from cubn.health.files.tensors import Entry, Tensor, Unread

OPTIONS = ("eps", "momentum", "num_features", "channel_axis", "running_variance")
"""What is an option where it stands beside tensors."""

MOST_OF_NAME = 1024
"""Characters, the way included: what lies deeper is left out."""

_OF_MODULES = ("_modules", "_parameters", "_buffers")
"""Attributes of torch's modules that are no part of a name."""


_PLAIN = (int, float, str, type(None))


def entries(root: Any) -> Iterator[Entry]:
    """Tensors and options under their names; each container once, so that what contains itself ends."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        inner = []
        for key, value in _items(node):
            if len(path) + len(key) > MOST_OF_NAME:
                continue
            if isinstance(value, dict | list | tuple | Opaque):
                inner.append((path if key in _OF_MODULES else _joined(path, key), value))
                if isinstance(value, Opaque) and key.rpartition(".")[2] in STATISTICS:
                    yield _entry(path, key, Unread(str(value.made_by or "objects")))
            elif isinstance(value, Tensor) or (key in OPTIONS and isinstance(value, _PLAIN)):
                yield _entry(path, key, value)
        waiting += reversed(inner)


def _items(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Opaque):
        node = node.state
    if isinstance(node, list | tuple):
        node = dict(enumerate(node))
    return ((str(key), value) for key, value in node.items()) if isinstance(node, dict) else iter(())


def _entry(path: str, key: str, value: Any) -> Entry:
    """Names with dots are of a state_dict, and the way to it is its collection's name."""
    return Entry(path, key, value) if "." in key else Entry("", _joined(path, key), value)


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
