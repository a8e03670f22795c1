"""The stages of tests/gpu/run.sh: what each does, in which order, and how long it may take.

    python -m tests.gpu.run FOLDER [STAGE ...]

In the folder: <stage>.jsonl, a line for each result as it comes; <stage>.log, what was said besides; summary.json, the
device, versions and how each step ended.
"""

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.gpu.steps import Record, Step, run

PYTHON = sys.executable
PROCESSES = 14  # compile kernels at the same time

SIDE_BY_SIDE = ("streams", "graphs", "libraries", "devices", "ordering", "one_update", "torch_modules")
"""Files of tests/gpu that the first stage runs, a process each."""


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", f"tests.gpu.{name}", *arguments)


def benchmark(*arguments: str) -> tuple[str, ...]:
    return (PYTHON, "asv_benchmarks/compare_gpu.py", *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    """Warnings of other libraries fail nothing here; `tests.gpu.lines` prints an object for each test."""
    options = ("-m", "gpu", "-p", "tests.gpu.lines", "-p", "no:cacheprovider", "-W", "default", "-q", "--tb=short")
    return (PYTHON, "-m", "pytest", *options, *arguments)


def parts(command: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The command for every part of its cases."""
    return [(*command, "--part", str(part), str(PROCESSES)) for part in range(PROCESSES)]


VERSIONS = Step("versions", 30, [(PYTHON, "asv_benchmarks/gpu_machine.py")])
LAYERS = ("--layers", "--operations", "forward_train", "backward")


class Stage(NamedTuple):
    """Steps, what is worth most first, and the seconds for all of them."""

    seconds: float
    steps: tuple[Step, ...]


STAGES = {
    "first": Stage(
        540,
        (
            VERSIONS,
            Step("launches", 60, [module("smoke", "--launches")]),
            Step("smoke", 120, parts(module("smoke"))),
            Step("kernels of layers", 70, parts(benchmark(*LAYERS, "--once"))),
            Step("layers", 90, [benchmark(*LAYERS, "--contestants", "copy", "cubn")]),
            Step("layers of others", 90, [benchmark(*LAYERS, "--contestants", "copy", "torch", "cudnn")]),
            Step("memory traffic", 50, [module("traffic")]),
            Step("tests", 110, [pytest(f"tests/gpu/test_{name}.py") for name in SIDE_BY_SIDE]),
            Step("host", 30, [benchmark("--host")]),
            Step("layers compiled", 60, [benchmark(*LAYERS, "--contestants", "copy", "compile")]),
        ),
    ),
    "second": Stage(
        200,
        (
            VERSIONS,
            Step("kernels of clusters", 60, parts(module("smoke", "--clusters"))),
            Step(
                "sanitizers",
                150,
                [module("sanitizer", tool, "--clusters") for tool in ("racecheck", "synccheck", "memcheck")],
            ),
        ),
    ),
    "tests": Stage(
        1800,
        (
            VERSIONS,
            Step("tests", 1500, [pytest("tests/gpu", "--ignore=tests/gpu/test_large.py")]),
            Step("large", 600, [pytest("tests/gpu/test_large.py")]),  # alone: they need most of the memory
        ),
    ),
    "benchmarks": Stage(
        1800, (VERSIONS, Step("benchmarks", 1500, [benchmark()]), Step("host", 120, [benchmark("--host")]))
    ),
    "sanitizers": Stage(
        1800,
        (
            VERSIONS,
            Step("smoke", 300, parts(module("smoke"))),
            Step(
                "sanitizers",
                1500,
                [module("sanitizer", tool) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")],
            ),
        ),
    ),
}


def run_stage(name: str, stage: Stage, folder: Path) -> Record:
    """What the summary says of it."""
    deadline = time.monotonic() + stage.seconds
    versions: Record = {}
    steps = {}
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as lines, open(folder / f"{name}.log", "w") as log:

        def write(record: Record) -> None:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()
            if "device" in record:
                versions.update(record)

        def say(text: str) -> None:
            log.write(text)
            log.flush()

        for step in stage.steps:
            last = run(step, deadline, write, say)
            steps[step.name] = {key: value for key, value in last.items() if key != "step"}
            print(f"{name}: {json.dumps(last, ensure_ascii=False)}", flush=True)
    return {"found": {key: value for key, value in versions.items() if key not in ("step", "at")}, "steps": steps}


def main(folder: Path, names: list[str]) -> int:
    if unknown := [name for name in names if name not in STAGES]:
        print(f"unknown stage {unknown[0]}; there are: {' '.join(STAGES)}", file=sys.stderr)
        return 2
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    for name in names or ["first", "second"]:
        summary[name] = run_stage(name, STAGES[name], folder)
        path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print("results:", folder)
    return int(any(step["status"] != "passed" for name in names for step in summary[name]["steps"].values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
