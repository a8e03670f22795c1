"""Random cases of a part of the campaign, run in a process of their own that may crash or hang.

A part is a module of this package with `draw(rng)`, which makes a case of a seeded random.Random, and `run(case)`,
which raises where cubn is wrong. A case prints itself as the code that makes it. Case K of seed S is always the same
one, so that `python -m tests.fuzz PART --seed S --case K` runs it again. Before a case is run it is written into a
journal, a file that outlives a crash.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import mmap
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds that a case may take; on a busy machine it compiles a few kernels
_JOURNAL_BYTES = 1 << 16


class Failed(AssertionError):
    """A case failed, crashed or hung; the message says how to run it again."""


@dataclass(frozen=True)
class Report:
    """How far a campaign came."""

    cases: int
    cpu_seconds: float

    def __str__(self) -> str:
        rate = self.cases / max(self.cpu_seconds, 1e-9)
        return f"{self.cases} cases in {self.cpu_seconds:.1f} CPU seconds, {rate:.0f} a second"


class Journal:
    """The case that is under way, in a file."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            file.truncate(_JOURNAL_BYTES)
            self._memory = mmap.mmap(file.fileno(), _JOURNAL_BYTES)

    def write(self, number: int, case: object) -> None:
        text = f"{number} {case!r}".encode()[: _JOURNAL_BYTES - 1]
        self._memory[: len(text) + 1] = text + b"\0"

    @staticmethod
    def read(path: str) -> tuple[int | None, str]:
        """The number of the last case, and the case."""
        text = Path(path).read_bytes().partition(b"\0")[0].decode(errors="replace")
        number, _, case = text.partition(" ")
        return int(number) if number else None, case


def part_named(name: str) -> Any:
    return importlib.import_module(f"tests.fuzz.{name}")


def case_of(part: Any, seed: int, number: int) -> Any:
    """Case `number` of a seed."""
    return part.draw(random.Random(f"{part.__name__} {seed} {number}"))


# --- in the process that runs cases ---------------------------------------------------------------------------------


def work(part: str, seed: int, numbers: Iterable[int], seconds: float | None, journal: str | None) -> int:
    """Run cases until one fails or the time is over; the exit status."""
    begin = time.monotonic()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    module = part_named(part)  # which takes seconds where it imports torch and JAX
    warnings.simplefilter("error")
    record = Journal(journal).write if journal else lambda number, case: None
    if seconds is not None:
        end = max(begin + seconds, time.monotonic() + seconds / 4)
    cpu, done = time.process_time(), 0
    for number in numbers:
        if seconds is not None and done and time.monotonic() > end:
            break
        case = case_of(module, seed, number)
        record(number, case)
        if error := failure(module, case):
            traceback.print_exception(error, file=sys.stdout)
            print(f"\n{part}: case {number} of seed {seed}: {case!r}", flush=True)  # what is simpler may crash
            if (simplest := simplified(module, case)) != case:
                print(f"\nSimpler, and fails too: {simplest!r}")
            return 1
        done += 1
    print(f"{part}: {Report(done, time.process_time() - cpu)}")
    return 0


def failure(module: Any, case: Any) -> BaseException | None:
    """What is raised by a case."""
    try:
        module.run(case)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    return None


def simplified(module: Any, case: Any, tries: int = 200) -> Any:
    """A case that fails although nothing can be made simpler any more, where the part knows what is simpler."""
    simpler: Callable[[Any], Iterator[Any]] | None = getattr(module, "simpler", None)
    found, end = simpler is not None, time.monotonic() + PATIENCE / 4
    while found and simpler:
        found = False
        for candidate in islice(simpler(case), tries):
            tries -= 1
            if time.monotonic() > end:
                break
            if failure(module, candidate):
                case, found = candidate, True
                break
    return case


def first_failure(module: Any, seed: int, cases: int) -> int | None:
    """The number of the first case that fails, in this process: for code that was broken on purpose."""
    return next((n for n in range(cases) if failure(module, case_of(module, seed, n))), None)


# --- in the test ----------------------------------------------------------------------------------------------------


def campaign(
    part: str,
    seed: int,
    seconds: float | None = None,
    *,
    cases: int | None = None,
    first: int = 0,
    environment: dict[str, str] | None = None,
    patience: float = PATIENCE,
) -> str:
    """Run cases of a part in a process of their own, for a time or a number of them; what it says at the end.

    The time is that of the process, imports and all; but a quarter of it is left to cases in any event. Raises Failed
    where one of them fails, ends the process, or does not come to an end.
    """
    settings = environment or {}
    which = {"--first": first}
    which |= {} if seconds is None else {"--seconds": seconds}
    which |= {} if cases is None else {"--cases": cases}
    result = _run(part, seed, which, settings, patience)
    if not result.how:
        return result.said.splitlines()[-1]
    text = f"{part}: case {result.number} of seed {seed} {result.how}:\n{result.case}\n\n{result.said}"
    which, note = {"--case": result.number}, ""
    if result.number is None:
        which = {}
    elif not _run(part, seed, which, settings, patience).how:
        which, note = {"--first": first, "--cases": result.number - first + 1}, " (not without the cases before it)"
    again = [
        *(f"{name}={shlex.quote(value)}" for name, value in settings.items()),
        *_command("python", part, seed, which),
    ]
    raise Failed(f"{text}\n\nAgain{note}: {' '.join(again)}\n")


class Result(NamedTuple):
    """How a process ended ("" if well), what it said, and its last case."""

    how: str
    said: str
    number: int | None
    case: str


def _command(python: str, part: str, seed: int, which: dict[str, Any]) -> list[str]:
    return [
        python,
        "-m",
        "tests.fuzz",
        part,
        "--seed",
        str(seed),
        *(str(word) for pair in which.items() for word in pair),
    ]


def _run(part: str, seed: int, which: dict[str, Any], settings: dict[str, str], patience: float) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        journal, output = Path(folder, "journal"), Path(folder, "output")
        journal.touch()
        with output.open("wb") as file:
            process = subprocess.Popen(
                _command(sys.executable, part, seed, {**which, "--journal": journal}),
                cwd=ROOT,
                env={**os.environ, **settings},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            ends = _ends(process, str(journal), patience)
        how = {0: "", 1: "failed"}.get(process.returncode, f"ended the process with status {process.returncode}")
        return Result(
            how if ends else f"hung for {patience:g} s",
            output.read_text(errors="replace"),
            *Journal.read(str(journal)),
        )


def _ends(process: subprocess.Popen[bytes], journal: str, patience: float) -> bool:
    """Whether the process comes to its end; one that stays at a case is made to say where it is, and killed."""
    last, since = None, time.monotonic()
    try:
        while True:
            try:
                process.wait(patience / 4)
                return True
            except subprocess.TimeoutExpired:
                now, _ = Journal.read(journal)
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > (PATIENCE if now is None else patience):  # nothing begun: it imports
                    process.send_signal(signal.SIGUSR1)
                    time.sleep(0.5)
                    return False
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def end_with_the_test() -> None:
    """Have this process killed when the one that started it is no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def numbers(first: int, cases: int | None) -> Iterable[int]:
    return count(first) if cases is None else range(first, first + cases)
