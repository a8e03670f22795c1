"""What a call costs around its kernel: microseconds on (2, 8) and (8, 16, 2, 2), one thread, beside aten and torch.nn.
"step" is a module's forward and its backward.

    python asv_benchmarks/host_cost.py                  measure, write results/<machine>/host_cost.json, print the table
    python asv_benchmarks/host_cost.py --compile        the modules through torch.compile beside them
    python asv_benchmarks/host_cost.py --stand-in       the CUDA backend, its launches left out; prints, writes nothing
    python asv_benchmarks/host_cost.py --against TREE   this source tree and another in turns; prints, writes nothing
    python asv_benchmarks/host_cost.py --table FILE     the table from a result file

"warm" is the least mean of many loops of one call, the calls taking turns. "cold" is the median of single calls, each
made after other work has been through the caches: 64 MiB of memory, and Python and C of other modules. Wall-clock time,
garbage collection off, for an idle machine.

The stand-in is tests/cuda_on_cpu's device, on which memory is NumPy's and a launch here does nothing, so that what is
left is the host's work: the results are not computed.
"""

import argparse
import ast
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmarks.host import SHAPES, calls, compiled_calls
from benchmarks.workloads import use_threads
from machine import write
from trees import Row, in_turns, print_rows, tree

THREADS = 1
SECONDS = 0.004  # of a warm loop
EVICTED = 64 << 20  # bytes
KEYS = ("shape", "operation", "contestant")


def measure(contestants: str, repeats: int, compiled: bool) -> list[Row]:
    """A row for a shape, an operation and a contestant whose name matches."""
    use_threads(THREADS)
    timed = {
        (shape, operation, contestant): call
        for shape in SHAPES
        for contestant, of_contestant in (calls(shape) | (compiled_calls(shape) if compiled else {})).items()
        if re.fullmatch(contestants, contestant)
        for operation, call in of_contestant.items()
    }
    gc.collect()
    gc.disable()
    warm, cold = _warm(list(timed.values()), repeats), _cold(list(timed.values()), repeats)
    gc.enable()
    return [
        dict(zip(KEYS, key, strict=True)) | {"warm_us": round(1e6 * least, 2), "cold_us": round(1e6 * median, 1)}
        for key, least, median in zip(timed, warm, cold, strict=True)
    ]


def _warm(timed: list[Callable[[], object]], repeats: int) -> list[float]:
    for call in timed:
        _loop(call, 20)  # the first loads its kernels
    counts = [max(1, round(SECONDS / _loop(call, 20))) for call in timed]
    means: list[list[float]] = [[] for _ in timed]
    for _ in range(repeats):
        for call, count, row in zip(timed, counts, means, strict=True):
            _loop(call, max(1, count // 10))  # the caches were another's
            row.append(_loop(call, count))
    return [min(row) for row in means]


def _loop(call: Callable[[], object], count: int) -> float:
    """The mean time of a call in seconds."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _cold(timed: list[Callable[[], object]], repeats: int) -> list[float]:
    memory, source = np.zeros(EVICTED, np.uint8), Path(ast.__file__).read_text()[:20_000].rpartition("\n\n\n")[0]
    times: list[list[float]] = [[] for _ in timed]
    for _ in range(repeats):
        for call, row in zip(timed, times, strict=True):
            memory += 1
            ast.unparse(ast.parse(source))
            row.append(_loop(call, 1))
    return [statistics.median(row) for row in times]


def stand_in() -> Callable[[], int]:
    """Let the CUDA backend compute on the CPU's arrays, before any call of cubn; returns the number of its launches."""
    sys.path.append(str(tree()))
    from cubn.backends import cpu
    from cubn.backends.cuda.backend import CudaBackend
    from tests.cuda_on_cpu.device import CpuDevice

    class WithoutLaunches(CpuDevice):
        launches = 0

        def launch(self, *launch: object) -> None:
            self.launches += 1

    backend = CudaBackend(device := WithoutLaunches())
    cpu.backend = lambda: backend
    return lambda: device.launches


def table(rows: list[Row]) -> str:
    """Markdown: "warm (cold)" in microseconds."""
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        of_call = cells.setdefault((str(tuple(row["shape"])), row["operation"]), {})
        of_call[row["contestant"]] = f"{row['warm_us']:.1f} ({row['cold_us']:.0f})"
    lines = [f"| array | operation | {' | '.join(contestants)} |", "|---|---|" + "---|" * len(contestants)]
    lines += [f"| {a} | {o} | {' | '.join(r.get(c, '') for c in contestants)} |" for (a, o), r in cells.items()]
    return "\n".join(lines)


def compared(arguments: list[str], other: Path, rounds: int) -> str:
    """Markdown: each row before (in the other tree), after (in this) and their ratio; the least of the rounds."""
    measured = list(in_turns(__file__, arguments, other, rounds))
    lines = ["| array | operation | contestant | | before, µs | after, µs | ratio |", "|---" * 7 + "|"]
    for i, row in enumerate(measured[0][0]):
        for figure in ("warm", "cold"):
            after, before = (min(both[side][i][f"{figure}_us"] for both in measured) for side in (0, 1))
            name = f"{tuple(row['shape'])} | {row['operation']} | {row['contestant']}"
            lines.append(f"| {name} | {figure} | {before:.1f} | {after:.1f} | {after / before:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--against", type=Path, metavar="TREE")
    parser.add_argument("--rounds", type=int, default=4, help="processes for a tree, with --against")
    parser.add_argument("--compile", action="store_true", help="the modules through torch.compile, too")
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, write nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    if options.against:
        arguments = [f"--repeats={options.repeats}", *(["--stand-in"] if options.stand_in else [])]
        print(compared(arguments, options.against, options.rounds))
        return
    launches = stand_in() if options.stand_in else lambda: 0
    rows = measure("numpy|torch" if options.stand_in else ".*", options.repeats, options.compile)
    if options.stand_in and not launches():
        raise SystemExit("the stand-in was not used")
    if options.json:
        print_rows(rows)
        return
    print(table(rows))
    if not options.stand_in:
        print("written:", write("host_cost.json", {"threads": THREADS, "repeats": options.repeats}, rows))


if __name__ == "__main__":
    main()
