"""Cycles of a way through machine code, by LLVM's static analyser `llvm-mca` and its model of a processor."""

import json
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from blocks import Way

INSTALL = "apt-get install llvm-19"
OLDEST = 17
"""Version of LLVM that has models of all processors that are named here."""

_STACK = re.compile(r"\(%[re]sp\b|\[sp\b")


class Processor(NamedTuple):
    """One that kernels are compiled for; the analyser may know it by another's name."""

    triple: str
    model: str
    shown: str


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
PROCESSORS = {
    "znver3": Processor(X86, "znver3", "Zen 3"),
    "znver4": Processor(X86, "znver4", "Zen 4"),
    "x86-64-v3": Processor(X86, "haswell", "AVX2 (Haswell)"),
    "skylake-avx512": Processor(X86, "skylake-avx512", "Skylake-X"),
    "sapphirerapids": Processor(X86, "sapphirerapids", "Sapphire Rapids"),
    "neoverse-v1": Processor(ARM, "neoverse-v1", "Neoverse V1"),
}


class Cost(NamedTuple):
    """Of some machine code; `taken` is for how many cycles it takes each of the processor's resources."""

    instructions: float
    uops: float
    cycles: float
    loads: float
    stores: float
    stack: float
    taken: dict[str, float]

    @property
    def bottleneck(self) -> tuple[str, float]:
        """The resource that is taken longest, and how long: no order of instructions is faster."""
        return max(self.taken.items(), key=lambda item: item[1], default=("", 0.0))


def analyser() -> str:
    """The newest llvm-mca there is."""
    found = [path for version in range(30, OLDEST - 1, -1) if (path := shutil.which(f"llvm-mca-{version}"))]
    found += [path for path in [shutil.which("llvm-mca")] if path and version(path) >= OLDEST]
    if not found:
        raise FileNotFoundError(f"no llvm-mca of LLVM {OLDEST} or later; on Debian and Ubuntu: {INSTALL}")
    return found[0]


def version(command: str = "") -> int:
    """Of LLVM, that the analyser is of."""
    said = subprocess.run([command or analyser(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)", said)
    return int(found[1]) if found else 0


def _report(code: Iterable[str], processor: Processor, *options: str) -> dict[str, Any]:
    command = [analyser(), f"-mtriple={processor.triple}", f"-mcpu={processor.model}", "-json", *options]
    command += ["-skip-unsupported-instructions=lack-sched"]  # atomic additions of AArch64: one a task
    done = subprocess.run(command, input="\n".join([*code, ""]), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def cost(way: Way, processor: Processor) -> Cost:
    """All of it, with data in the first cache and every jump foreseen."""
    marked = (
        line for i, piece in enumerate(way.pieces) for line in (f"# LLVM-MCA-BEGIN {i}", *piece, f"# LLVM-MCA-END {i}")
    )
    report = _report(marked, processor, "-iterations=10")
    of_pieces = [cost_of_region(region, report["TargetInfo"]["Resources"]) for region in report["CodeRegions"]]
    whole = (line for i in way.order for line in way.pieces[i])
    simulated = _report(whole, processor, "-iterations=1", "-instruction-info=false", "-resource-pressure=false")
    return together(of_pieces, way.order)._replace(cycles=simulated["CodeRegions"][0]["SummaryView"]["TotalCycles"])


def together(of_pieces: Sequence[Cost], order: Iterable[int]) -> Cost:
    """The costs of pieces in a row, added up."""
    times = Counter(order)
    taken: defaultdict[str, float] = defaultdict(float)
    for i, count in times.items():
        for resource, cycles in of_pieces[i].taken.items():
            taken[resource] += count * cycles
    added = (sum(count * of_pieces[i][field] for i, count in times.items()) for field in range(6))
    return Cost(*added, dict(taken))


def cost_of_region(region: dict[str, Any], resources: Sequence[str]) -> Cost:
    """Of one time through a region of the analyser's report."""
    summary, instructions = region["SummaryView"], region["InstructionInfoView"]["InstructionList"]
    uops = summary["TotaluOps"] / summary["Iterations"]
    taken = {"dispatch": uops / summary["DispatchWidth"]}
    for entry in region["ResourcePressureView"]["ResourcePressureInfo"]:
        if entry["InstructionIndex"] == len(instructions):  # of all of them
            name = resources[entry["ResourceIndex"]].partition(".")[0]  # of equal units the busiest
            taken[name] = max(taken.get(name, 0.0), entry["ResourceUsage"])
    return Cost(
        len(instructions),
        uops,
        summary["TotalCycles"] / summary["Iterations"],
        sum(instruction["mayLoad"] for instruction in instructions),
        sum(instruction["mayStore"] for instruction in instructions),
        sum(bool(_STACK.search(text)) for text in region["Instructions"]),
        taken,
    )
