"""The stages of tests/gpu/run.sh: what each does, in which order, and how long it may take.

    python -m tests.gpu.run FOLDER [--rehearse] [STAGE ...]

In the folder: <stage>.jsonl, a line for each result as it comes; <stage>.log, what was said besides; summary.json, the
device, versions and how each step ended. With --rehearse there is no device: a case or two of each step, and stand-ins
for CuPy and for PyTorch's side of CUDA.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.gpu.steps import Command, Record, Step, run

PYTHON = sys.executable

SIDE_BY_SIDE = ("ordering", "streams", "graphs", "libraries", "devices", "one_update", "torch_modules")
"""Files of tests/gpu that the first stage runs, a process each."""

SMALLEST = "^2048@7² x 32 nchw"
STAND_INS = Path(__file__).parents[1] / "cuda_on_cpu" / "stand_in"


class Stage(NamedTuple):
    """Steps, what is worth most first, and the seconds for all of them."""

    seconds: float
    steps: tuple[Step, ...]

    def slower(self, times: float) -> "Stage":
        """With as many times the seconds."""
        steps = (step._replace(seconds=times * step.seconds) for step in self.steps)
        return Stage(times * self.seconds, tuple(steps))


def module(name: str, *arguments: str) -> Command:
    return (PYTHON, "-m", f"tests.gpu.{name}", *arguments)


def sanitizers(*tools: str, parts: int = 1, options: tuple[str, ...] = ()) -> list[Command]:
    """Each tool, for every part of the cases."""
    return [
        module("sanitizer", tool, *options, "--part", str(part), str(parts)) for tool in tools for part in range(parts)
    ]


def stages(rehearse: bool = False) -> dict[str, Stage]:
    processes, cut = (1, 1000) if rehearse else (14, 14)  # most of the time kernels are compiled
    patience = 4 if rehearse else 1  # a processor computes, and others compute there too
    files = SIDE_BY_SIDE[:1] if rehearse else SIDE_BY_SIDE
    chosen = ("-k", "tracked and Cupy") if rehearse else ()

    def parts(command: Command) -> list[Command]:
        """The command for its cases in parts."""
        return [(*command, "--part", str(part), str(cut)) for part in range(processes)]

    def benchmark(*arguments: str) -> Command:
        script = ("asv_benchmarks/compare_gpu.py", *arguments)
        return (*module("torch_on_cpu"), *script, "--only", SMALLEST) if rehearse else (PYTHON, *script)

    def pytest(*arguments: str) -> Command:
        """Warnings of other libraries fail nothing here; `tests.gpu.lines` prints an object for each test."""
        options = ("-m", "gpu", "-p", "tests.gpu.lines", "-p", "no:cacheprovider", "-W", "default", "--tb=short")
        return (PYTHON, "-m", "pytest", *options, *chosen, *arguments)

    versions = Step("versions", 30, [(PYTHON, "asv_benchmarks/gpu_machine.py")])
    layers = ("--layers", "--operations", "forward_train", "backward")
    found = {
        "first": Stage(
            540,
            (
                versions,
                Step("launches", 60, [module("smoke", "--launches")]),
                Step("smoke", 120, parts(module("smoke"))),
                Step("kernels of layers", 70, parts(benchmark(*layers, "--once"))),
                Step("layers", 60, [benchmark(*layers, "--dtypes", "bfloat16", "--contestants", "copy", "cubn")]),
                Step(
                    "layers, float32", 60, [benchmark(*layers, "--dtypes", "float32", "--contestants", "copy", "cubn")]
                ),
                Step("layers of others", 90, [benchmark(*layers, "--contestants", "copy", "torch", "cudnn")]),
                Step("memory traffic", 50, [module("traffic")]),
                Step("tests", 110, [pytest(f"tests/gpu/test_{name}.py") for name in files]),
                Step("host", 60, [benchmark("--host")]),
                Step("layers compiled", 90, [benchmark(*layers, "--contestants", "copy", "compile")]),
            ),
        ),
        "second": Stage(
            200,
            (
                versions,
                Step("kernels of clusters", 60, parts(module("smoke", "--clusters"))),
                Step("clusters", 150, sanitizers("racecheck", "synccheck", "memcheck", options=("--clusters",))),
            ),
        ),
        "tests": Stage(
            2400,
            (
                versions,
                Step("tests", 1800, [pytest("tests/gpu", "--ignore=tests/gpu/test_large.py")]),
                Step("large", 600, [pytest("tests/gpu/test_large.py")]),  # alone: it needs most of the memory
            ),
        ),
        "benchmarks": Stage(
            2400, (versions, Step("arrays", 2100, [benchmark()]), Step("host", 120, [benchmark("--host")]))
        ),
        "sanitizers": Stage(
            2400,
            (
                versions,
                Step("smoke", 300, parts(module("smoke"))),
                Step("kernels", 2100, sanitizers("memcheck", "racecheck", "synccheck", "initcheck", parts=4)),
            ),
        ),
    }
    return {name: stage.slower(patience) for name, stage in found.items()}


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


def main(folder: Path, arguments: list[str]) -> int:
    rehearse = arguments[:1] == ["--rehearse"]
    there_are, names = stages(rehearse), arguments[rehearse:] or ["first", "second"]
    if unknown := [name for name in names if name not in there_are]:
        print(f"unknown stage {unknown[0]}; there are: {' '.join(there_are)}", file=sys.stderr)
        return 2
    if rehearse:
        os.environ["PYTHONPATH"] = f"{STAND_INS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        summary[name] = run_stage(name, there_are[name], folder)
        path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print("results:", folder)
    return int(any(step["status"] != "passed" for name in names for step in summary[name]["steps"].values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
