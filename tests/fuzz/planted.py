"""A part whose cases fail, crash or hang when the environment says so: for the harness's own tests."""

import ctypes
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    fault: bool
    number: int


def draw(rng: random.Random) -> Case:
    return Case(rng.random() < 0.3, rng.randrange(1, 100))


def simpler(case: Case) -> Iterator[Case]:
    if case.number:
        yield replace(case, number=case.number // 2)


_run: list[Case] = []


def run(case: Case) -> None:
    _run.append(case)
    if len(_run) > 4 and os.environ.get("CUBN_PLANTED") == "fails after four":
        raise AssertionError("as planted")
    if case.fault:
        match os.environ.get("CUBN_PLANTED"):
            case "fails":
                raise AssertionError("as planted")
            case "crashes":
                ctypes.string_at(8)
            case "hangs":
                time.sleep(600)
