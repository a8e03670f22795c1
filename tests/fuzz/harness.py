"""Random cases of a part of the campaign, run in a process of their own that may crash or hang.

A part is a module of this package with `draw(rng)`, which makes a case of a seeded random.Random, and `run(case)`,
which raises where cubn is wrong. A case prints itself as the code that makes it. Case K of seed S is always the same
one, so that `python -m tests.fuzz PART --seed S --case K` runs it again. Before a case is run it is written into a
journal, a file that outlives a crash.
"""

from __future__ import annotations

import faulthandler
import importlib
import mmap
import os
import random
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
from typing import Any

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


def command(part: str, seed: int, number: int) -> str:
    return f"python -m tests.fuzz {part} --seed {seed} --case {number}"


# --- in the process that runs cases ---------------------------------------------------------------------------------


def work(part: str, seed: int, numbers: Iterable[int], seconds: float | None, journal: str | None) -> int:
    """Run cases until one fails or the time is over; the exit status."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    module = part_named(part)
    warnings.simplefilter("error")
    record = Journal(journal).write if journal else lambda number, case: None
    begin, cpu, done = time.monotonic(), time.process_time(), 0
    for number in numbers:
        if seconds is not None and done and time.monotonic() - begin > seconds:
            break
        case = case_of(module, seed, number)
        record(number, case)
        if error := failure(module, case):
            simplest = simplified(module, case)
            traceback.print_exception(error)
            print(f"\n{part}: case {number} of seed {seed}: {case!r}")
            if simplest != case:
                print(f"\nSimpler, and fails too: {simplest!r}")
            print(f"\nAgain: {command(part, seed, number)}")
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
    found = simpler is not None
    while found and simpler:
        found = False
        for candidate in islice(simpler(case), tries):
            tries -= 1
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

    Raises Failed where one of them fails, ends the process, or does not come to an end.
    """
    with tempfile.TemporaryDirectory() as folder:
        journal, output = Path(folder, "journal"), Path(folder, "output")
        journal.touch()
        arguments = [part, "--seed", seed, "--first", first, "--journal", journal]
        arguments += [] if seconds is None else ["--seconds", seconds]
        arguments += [] if cases is None else ["--cases", cases]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz", *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            hung = not _ends(process, str(journal), patience)
        said = output.read_text(errors="replace")
        number, case = Journal.read(str(journal))
    if not hung and process.returncode == 0:
        return said.splitlines()[-1]
    settings = "".join(f"{name}={value} " for name, value in (environment or {}).items())
    if hung:
        how = f"hung for {patience:.0f} s"
    elif process.returncode == 1:
        how = "failed"
    else:
        how = f"ended the process with status {process.returncode}"
    again = settings + (command(part, seed, number) if number is not None else f"python -m tests.fuzz {part}")
    raise Failed(f"{part}: case {number} of seed {seed} {how}:\n{case}\n\nAgain: {again}\n\n{said}")


def _ends(process: subprocess.Popen[bytes], journal: str, patience: float) -> bool:
    """Whether the process comes to its end; one that stays at a case is made to say where it is, and killed."""
    try:
        last: int | None = -1
        while True:
            try:
                process.wait(patience)
                return True
            except subprocess.TimeoutExpired:
                now, _ = Journal.read(journal)
                if now == last:
                    process.send_signal(signal.SIGUSR1)
                    time.sleep(1)
                    return False
                last = now
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def numbers(first: int, cases: int | None) -> Iterable[int]:
    return count(first) if cases is None else range(first, first + cases)
