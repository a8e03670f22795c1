"""Whose threads compute: the environment variable CUBN_THREADING, and what is chosen where it leaves the choice."""

from __future__ import annotations

import os
import sys
from typing import Literal, NamedTuple

from cubn.backends.cpu import openmp
from cubn.backends.cpu.openmp import Runtime
from cubn.errors import message

Setting = Literal["auto", "openmp", "own"]

SPINNING, ACTIVE = 50e-6, 1e-3
"""Seconds: to wake a worker takes about as long as the first; the second is for OMP_WAIT_POLICY=active."""


class Choice(NamedTuple):
    """A runtime whose teams are used, one that only says how many threads there may be, and why."""

    teams_of: Runtime | None
    limited_by: Runtime | None
    reason: str
    modules: int | None  # how many were imported then; None: more of them change nothing


def choice(forked: bool) -> Choice:
    """What holds from now on.

    Raises
    ------
    ValueError
        CUBN_THREADING is none of auto, openmp and own, or openmp where that cannot be.
    """
    setting, imported = _setting(), len(sys.modules)
    runtime, for_good = openmp.loaded()
    modules = None if for_good or not openmp.HERE else imported
    if setting == "own":
        return Choice(None, runtime, "CUBN_THREADING=own", modules)
    if forked:
        reason = "the threads of a parent's OpenMP runtime are not in a forked process"
        return Choice(None, runtime, reason, modules)
    if runtime:
        return Choice(runtime, runtime, runtime.file, modules)
    if setting == "openmp":
        remedy = "Import torch or another library that brings one first, or unset it for a pool of cubn's own."
        raise ValueError(
            message("CUBN_THREADING", "find a loaded runtime", "openmp, and none", remedy, function="cubn")
        )
    where = "; PyTorch brings one" if openmp.HERE else f", as far as is looked for on {sys.platform}"
    return Choice(None, None, f"no OpenMP runtime is loaded{where}", modules)


def _setting() -> Setting:
    asked = os.environ.get("CUBN_THREADING", "").strip().lower() or "auto"
    if asked in ("auto", "openmp", "own"):
        return asked  # type: ignore[return-value]
    remedy = "Unset it for auto: the threads of an OpenMP runtime that is loaded, else a pool of cubn's own."
    raise ValueError(message("CUBN_THREADING", "be auto, openmp or own", repr(asked), remedy, function="cubn"))


def spinning() -> float:
    """Seconds for which a worker of the pool spins after a job, so as to be awake for the next one."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").strip().lower()
    return {"passive": 0.0, "active": ACTIVE}.get(policy, SPINNING)
