"""Steps in alternating blocks, and what of a step is batch norm's: medians with 95 % intervals. Imports no torch."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Step = Callable[[], object]
Blocks = dict[str, Array]
"""By contestant, the median step of each block in seconds; blocks of one index were neighbours in time."""

PAUSE = 0.05  # seconds before a block: the threads of the one before have stopped spinning
ENOUGH = 0.15  # seconds of a block
RESAMPLES = 10_000
INTERVAL = (0.025, 0.975)


def alternate_blocks(steps: dict[str, Step], count: int) -> Blocks:
    """So many blocks of each contestant, in turns. The order rotates and runs backwards every second time, so that
    nobody is always first, or always behind the same other.
    """
    for step in steps.values():
        step()  # compiles, and loads kernels
    medians: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(count):
        for name in turn(list(steps), i):
            time.sleep(PAUSE)
            medians[name].append(_block(steps[name]))
    return {name: np.array(row) for name, row in medians.items()}


def turn(names: list[str], i: int) -> list[str]:
    """The order in which the i-th blocks are run."""
    first = i % len(names)
    return (names[first:] + names[:first])[:: -1 if i % 2 else 1]


def _block(step: Step) -> float:
    """The median time of a step. The first does not count, unless it is a block by itself: it warms the caches."""
    first = _seconds(step)
    if first >= ENOUGH:
        return first
    times: list[float] = []
    while sum(times) < ENOUGH:
        times.append(_seconds(step))
    return statistics.median(times)


def _seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


class Timed:
    """The two calls of a contestant, and the seconds that they took so far."""

    def __init__(self, calls: Any) -> None:
        self.calls = calls
        self.reset()

    def reset(self) -> None:
        self.forward_seconds = self.backward_seconds = 0.0

    def forward_train(self, *arguments: object, **options: object) -> Any:
        begin = time.perf_counter()
        done = self.calls.forward_train(*arguments, **options)
        self.forward_seconds += time.perf_counter() - begin
        return done

    def backward(self, *arguments: object) -> Any:
        begin = time.perf_counter()
        done = self.calls.backward(*arguments)
        self.backward_seconds += time.perf_counter() - begin
        return done


class TimedStep(NamedTuple):
    """A step, and the calls that it makes."""

    step: Step
    calls: Timed


def seconds_in_calls(steps: dict[str, TimedStep], count: int) -> dict[str, tuple[float, float]]:
    """By contestant, the median over so many steps of what its forwards and its backwards take in one."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for i in range(count):
        for name in turn(list(steps), i):
            step, calls = steps[name]
            time.sleep(PAUSE)
            step()  # warms the caches
            calls.reset()
            step()
            found[name].append((calls.forward_seconds, calls.backward_seconds))
    return {name: tuple(map(float, np.median(rows, axis=0))) for name, rows in found.items()}


class Estimate(NamedTuple):
    """A value and its 95 % interval; `low <= limit` is what an "at most" is held to."""

    value: float
    low: float
    high: float


def estimate(blocks: Blocks, statistic: Callable[[Blocks], Array]) -> Estimate:
    """Of a statistic over the last axis, with a bootstrap over blocks: those of one index are drawn together, so that
    what slows the machine down for a while cancels out in differences.
    """
    table = np.stack(list(blocks.values()))
    drawn = np.random.default_rng(0).integers(table.shape[1], size=(RESAMPLES, table.shape[1]))
    resampled = statistic(dict(zip(blocks, table[:, drawn], strict=True)))
    low, high = np.quantile(resampled, INTERVAL, method="nearest")  # no arithmetic: values may be infinite
    return Estimate(float(statistic(blocks)), float(low), float(high))


def step_time(name: str) -> Callable[[Blocks], Array]:
    return lambda blocks: np.median(blocks[name], axis=-1)


def difference(name: str, without: str) -> Callable[[Blocks], Array]:
    """Seconds of a step that one contestant takes and the other does not: the share of what the other leaves out."""
    return lambda blocks: np.median(blocks[name] - blocks[without], axis=-1)


def share_ratio(name: str, reference: str, without: str) -> Callable[[Blocks], Array]:
    """A contestant's share as a multiple of another's; infinite where the other's is lost in the noise."""

    def statistic(blocks: Blocks) -> Array:
        ours, theirs = difference(name, without)(blocks), difference(reference, without)(blocks)
        return np.divide(ours, theirs, out=np.full(np.shape(ours), np.inf), where=theirs > 0)

    return statistic
