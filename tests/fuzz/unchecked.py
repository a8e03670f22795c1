"""Bad input for cubn without one of its checks, which CUBN_UNCHECKED names: a campaign that must fail, if only by a
crash (or, with CUBN_GONE=no, with that check, and then pass).
"""

import os
import pkgutil
import warnings
from typing import Any, NamedTuple

from cubn import _layout
from tests.fuzz import bad_input


class Check(NamedTuple):
    """A function of cubn's that refuses, what takes its place, and the cases it is there for."""

    module: str
    name: str
    instead: Any
    target: str
    role: str


CHECKS = {
    "eps": Check("cubn.forward", "checked_eps", float, "normalize", "eps"),
    "shape": Check("cubn._arguments", "check_like", lambda *arguments: None, "forward", "residual"),
    "mask": Check(
        "cubn._layout",
        "mask_operand",
        lambda mask, shape, axis: _layout.operand(mask, 0) if len(mask.shape) > 1 else None,
        "moments",
        "mask",
    ),
    "writable": Check("cubn._arrays", "check_writable", lambda *arguments: None, "forward", "out"),
    "statistics": Check("cubn._state.holding", "check_together", lambda described: None, "state", "running_mean"),
    "known out": Check("cubn._calls", "Call.takes", lambda *arguments: True, "forward", "out"),
    "known read-only": Check("cubn._arrays.numpy", "NumPy.writable", lambda self, x: True, "forward_train", "out"),
    "changed arrays": Check("cubn._state.arrays", "Held.describes", lambda *arguments: True, "changed", "running_var"),
    "known flags": Check("cubn._arrays.numpy", "Headers.unchanged", lambda self: True, "changed", "running_mean"),
}


def draw(rng: Any) -> Any:
    """A case that the missing check is there for."""
    check = CHECKS[os.environ["CUBN_UNCHECKED"]]
    while True:
        case = bad_input.draw(rng)
        if case.target == check.target and case.bad[0][0] == check.role:
            return case


def run(case: Any) -> None:
    check = CHECKS[os.environ["CUBN_UNCHECKED"]]
    if os.environ["CUBN_GONE"] == "yes":
        where, _, name = f"{check.module}.{check.name}".rpartition(".")
        setattr(pkgutil.resolve_name(where), name, check.instead)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad_input.run(case)
