"""What was written down of a state: its entries, all there and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cubn._arguments import plain
from cubn._state.arrays import ARRAYS
from cubn._state.counted import COUNTERS
from cubn._state.options import OPTIONS
from cubn.errors import message

_NEEDED = ("num_features", "eps", "channel_axis")  # what else a state does not have is left out


def checked_entries(d: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not None."""
    if not isinstance(d, Mapping):
        raise TypeError(message("d", "be a mapping, as from to_dict", type(d).__name__))
    found = {name: value for name in d if (value := plain(d[name])) is not None}
    needed = _NEEDED + (COUNTERS if "running_mean" in found else ())
    if missing := [name for name in needed if name not in found]:
        remedy = "For arrays of another origin there is from_arrays."
        raise KeyError(message("d", "have the entries of to_dict", f"no {', '.join(missing)}", remedy))
    if other := [str(name) for name in found if name not in (*OPTIONS, *ARRAYS, *COUNTERS)]:
        rule, remedy = "have the entries of to_dict and no others", "Correct its name, or leave it out."
        raise ValueError(message("d", rule, ", ".join(other), remedy))
    return found
