"""Constants of the planner, which may change no result, drawn at random."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

from cubn import _calls
from cubn.backends.cpu import plan, prepare, stages

CONSTANTS = {
    "SERIAL_BYTES": [0, 1 << 12],
    "STREAM_BYTES": [0, 1 << 14],
    "BLOCK_BYTES": [1, 64, 1 << 10],
    "FEW_CHANNELS": [0, 3, 64],
    "PERIOD": [128, 200],
    "SLAB_BYTES": [0, 1 << 12, 1 << 30],
    "STRETCH_BYTES": [1, 1 << 9, 1 << 20],
    "WIDEST_SLAB": [1, 2, 64],
    "TASKS": [1, 3, 1000],
    "WIDEST": [16, 48],
    "NARROWEST": [16, 64],
    "LEAST_A_ROW": [1, 1 << 14],
    "SAMPLES_A_ROW": [1, 16, 2048],
    "VALUES_A_ROW": [1, 1 << 12, 1 << 20],
}
"""Other values for constants of `plan`: all make valid plans."""


def draw(rng: random.Random) -> tuple[tuple[str, int], ...]:
    return tuple((name, rng.choice(values)) for name, values in CONSTANTS.items() if rng.random() < 0.3)


@contextlib.contextmanager
def planned(constants: tuple[tuple[str, int], ...]) -> Iterator[None]:
    """Plans made anew, with constants of their own."""
    before = {name: getattr(plan, name) for name, _ in constants}
    _set(dict(constants))
    try:
        yield
    finally:
        _set(before)


def _set(constants: dict[str, int]) -> None:
    if not constants:
        return
    for name, value in constants.items():
        setattr(plan, name, value)
    for module in (plan, stages, prepare):
        for function in vars(module).values():
            if hasattr(function, "cache_clear") and function is not stages.kernel:  # which stays loaded for ever
                function.cache_clear()
    _calls.clear()
