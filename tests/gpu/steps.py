"""Steps of a run on a machine that is there for minutes: each within its deadline, none of them stops another.

A step is some processes at a time. What they print as JSON objects, a line each, is written down as it comes, with the
step's name and the seconds since it began; then a line for the step itself, with how its processes ended. Whatever
happens to a process, to a step or to the machine, the lines before it are there.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

PATIENCE = 5.0  # seconds for what an ended process had printed
LATE = "out of time"
TAIL = 1500  # characters of what a process said before it failed

Command = tuple[str, ...]
Record = dict[str, object]


class Step(NamedTuple):
    """Commands that run at the same time, and the seconds they have."""

    name: str
    seconds: float
    commands: Sequence[Command]


class Process:
    """One of a step's. A thread reads what it prints, so that no pipe fills up."""

    def __init__(self, command: Command, write: Callable[[Record], None]) -> None:
        self.said: list[str] = []
        self.status = ""
        try:
            self._popen = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                start_new_session=True,  # so that it is ended with all that it started
            )
        except OSError as error:
            self.said.append(str(error))
            self.status = "not started"
            return
        self._reader = threading.Thread(target=self._read, args=(write,), daemon=True)
        self._reader.start()

    def _read(self, write: Callable[[Record], None]) -> None:
        assert self._popen.stdout
        with self._popen.stdout as lines:
            for line in lines:
                record = _object(line)
                if record is None:
                    self.said.append(line)
                else:
                    write(record)

    def wait(self, deadline: float) -> None:
        """Until it ends, or is ended at the deadline, with what it has left running."""
        if self.status:
            return
        try:
            self.status = str(self._popen.wait(max(0.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            self.status = LATE
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._reader.join(PATIENCE)


def _object(line: str) -> Record | None:
    """The JSON object that is the whole line, if it is one."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def run(step: Step, deadline: float, write: Callable[[Record], None], log: Callable[[str], None]) -> Record:
    """The step's own record, after those of its processes; `deadline`, in time.monotonic(), is the stage's."""
    begin = time.monotonic()
    lock = threading.Lock()

    def stamped(record: Record) -> None:
        with lock:
            write({"step": step.name, "at": round(time.monotonic() - begin, 2), **record})

    if begin >= deadline:
        last: Record = {"step": step.name, "status": "not run: no time left", "seconds": 0.0}
        write(last)
        return last
    processes = [Process(command, stamped) for command in step.commands]
    for process in processes:
        process.wait(min(deadline, begin + step.seconds))
    for command, process in zip(step.commands, processes, strict=True):
        log(f"== {' '.join(command)}: {process.status}\n{''.join(process.said)}")
    failed = [process for process in processes if process.status != "0"]
    late = any(process.status == LATE for process in failed)
    last = {
        "step": step.name,
        "status": LATE if late else "failed" if failed else "passed",
        "seconds": round(time.monotonic() - begin, 2),
    }
    if failed:
        last["processes"] = [process.status for process in processes]
        last["error"] = next((text for p in failed if (text := "".join(p.said)[-TAIL:])), "")
    write(last)
    return last
