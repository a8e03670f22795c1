"""Measure cubn next to torch in one process, in turns, and write asv_benchmarks/results/<machine>/cpu.json.

    python asv_benchmarks/compare.py                      measure every workload in float32
    python asv_benchmarks/compare.py --dtype bfloat16     another type, into cpu-bfloat16.json
    python asv_benchmarks/compare.py --headline           the arrays of the README's table alone, into the same file
    python asv_benchmarks/compare.py --only '@56² nchw'   only what matches; prints, writes nothing
    python asv_benchmarks/compare.py --against TREE       cubn of this source tree and of another, without torch.compile
    python asv_benchmarks/compare.py --table FILE         the README's table, from a result file

Two threads on all sides. Forward, inference and "backward into dx" write into given memory; "backward" allocates its
results on all sides. torch has no backward into given memory: both rows compare with the same torch call.
torch.compile, which needs a C++ compiler, has both.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.compiled import compiled_operations
from benchmarks.workloads import THREADS, WORKLOADS, Arrays, Workload, alternate, arrays, operations, use_threads
from machine import write
from trees import Row, in_turns, print_rows

COLUMNS = ("forward_train", "forward", "moments", "backward", "backward into dx")
HEADLINE = ("64@112²", "256@56²", "512@28²", "1024@14²", "2048@7²", "(4096, 1024)", "(65536, 64)", "64@64³")


def title(workload: Workload) -> str:
    return f"{workload.name} {workload.layout}"


def measure(only: str, dtype: torch.dtype, turns: int, compiles: bool) -> Iterator[Row]:
    """One row for a workload and an operation: milliseconds of reading x, of a copy, of cubn, of torch, and of
    torch.compile: None where it did not work.
    """
    use_threads()
    for workload in WORKLOADS:
        if not re.search(only, title(workload)):
            continue
        a = arrays(workload, dtype)
        timed = operations(a)
        copy, read = timed.pop("copy").cubn, timed.pop("read").cubn
        compiled = compiled_or_why_not(a) if compiles else {}
        (once,) = (1e3 * t for t in alternate([read], turns))
        for name, operation in timed.items():
            calls = {"copy_ms": copy, "cubn_ms": operation.cubn, "torch_ms": operation.torch}
            if name in compiled:
                calls["compiled_ms"] = compiled[name]
            row = {"array": workload.name, "shape": workload.shape, "layout": workload.layout, "operation": name}
            row |= {"read_ms": once}
            row |= {key: 1e3 * t for key, t in zip(calls, alternate(list(calls.values()), turns), strict=True)}
            yield row if name in compiled or not compiles else row | {"compiled_ms": None}


def compiled_or_why_not(a: Arrays) -> dict[str, Callable[[], object]]:
    try:
        return compiled_operations(a)
    except RuntimeError as error:
        print("torch.compile does not work here:", str(error).strip().splitlines()[0], file=sys.stderr)
        return {}


def line(row: Row) -> str:
    name = f"{row['array']:<14} {row['layout']:<5} {row['operation']:<17}"
    faster = ", ".join(f"{ratio} x {other}" for other, ratio in ratios(row).items())
    return f"{name} {row['cubn_ms']:8.3f} ms = {row['cubn_ms'] / row['copy_ms']:5.2f} copies, {faster}"


def ratios(row: Row) -> dict[str, str]:
    """The speed of cubn as a multiple of torch's and of torch.compile's; "?" where that did not work."""
    others = {"torch": "torch_ms", "torch.compile": "compiled_ms"}
    found = {name: row[key] for name, key in others.items() if key in row}
    return {name: f"{time / row['cubn_ms']:.1f}" if time else "?" for name, time in found.items()}


def table(path: Path) -> str:
    """The headline arrays of a result file as Markdown: each operation as "copies (times torch's speed, times
    torch.compile's)", and reading the array once as copies.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["array"] not in HEADLINE:
            continue
        text = f"{row['cubn_ms'] / row['copy_ms']:.2f} ({', '.join(f'{ratio}×' for ratio in ratios(row).values())})"
        of_array = cells.setdefault((row["array"], row["layout"]), {})
        of_array |= {row["operation"]: text, "read": f"{row['read_ms'] / row['copy_ms']:.2f}"}
    columns = ("read", *COLUMNS)
    lines = [f"| array | layout | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    lines += [f"| {array} | {layout} | {' | '.join(r[c] for c in columns)} |" for (array, layout), r in cells.items()]
    return "\n".join(lines)


def compare_trees(only: str, dtype: str, turns: int, other: Path, rounds: int) -> None:
    """Print cubn's time before (in the other tree) and after (in this), each the least of so many processes."""
    found = []
    for workload in WORKLOADS:
        if not re.search(only, title(workload)):
            continue
        exactly = f"^{re.escape(title(workload))}$"
        arguments = ["--no-compile", f"--only={exactly}", f"--dtype={dtype}", f"--turns={turns}"]
        measured = list(in_turns(__file__, arguments, other, rounds))
        for i, row in enumerate(measured[0][0]):
            after, before = (min(both[side][i]["cubn_ms"] for both in measured) for side in (0, 1))
            found.append(after / before)
            name = f"{title(workload):<20} {row['operation']:<17}"
            print(f"{name} {before:9.3f} ms, {after:9.3f} ms: {found[-1]:5.2f} of the time", flush=True)
    mean = math.exp(sum(map(math.log, found)) / len(found))
    print(f"geometric mean {mean:.3f}, from {min(found):.2f} to {max(found):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--headline", action="store_true")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--against", type=Path, metavar="TREE")
    parser.add_argument("--rounds", type=int, default=2, help="processes for a tree and a workload, with --against")
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, write nothing")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    if options.against:
        compare_trees(options.only, options.dtype, options.turns, options.against, options.rounds)
        return
    rows = []
    only = "|".join(rf"^{re.escape(name)} " for name in HEADLINE) if options.headline else options.only
    for row in measure(only, getattr(torch, options.dtype), options.turns, not options.no_compile):
        rows.append(row)
        if not options.json:
            print(line(row), flush=True)
    if options.json:
        print_rows(rows)
        return
    if options.only:
        return
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    header: dict[str, object] = {"threads": THREADS, "dtype": options.dtype, "turns": options.turns}
    print("written:", write(f"cpu{suffix}.json", header, rows))


if __name__ == "__main__":
    main()
