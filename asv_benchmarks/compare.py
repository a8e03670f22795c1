"""Measure cubn next to torch in one process, in turns, and write asv_benchmarks/results/<machine>/cpu.json.

    python asv_benchmarks/compare.py                      measure every workload in float32
    python asv_benchmarks/compare.py --dtype bfloat16     another type, into cpu-bfloat16.json
    python asv_benchmarks/compare.py --only '@56² nchw'   only what matches; prints, writes nothing
    python asv_benchmarks/compare.py --table FILE         the README's table, from a result file

Two threads on both sides. Forward, inference and "backward into dx" write into given memory; "backward" allocates its
results on both sides. torch has no backward into given memory: both rows compare with the same torch call.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from benchmarks.workloads import THREADS, WORKLOADS, alternate, operations, use_threads
from machine import write

COLUMNS = ("forward_train", "forward", "moments", "backward", "backward into dx")
HEADLINE = ("64@112²", "256@56²", "512@28²", "1024@14²", "2048@7²", "(4096, 1024)", "(65536, 64)", "64@64³")


def measure(only: str, dtype: torch.dtype, turns: int) -> list[dict[str, object]]:
    """One row for a workload and an operation: milliseconds of reading x, of a copy, of cubn, of torch."""
    use_threads()
    rows: list[dict[str, object]] = []
    for workload in WORKLOADS:
        if not re.search(only, f"{workload.name} {workload.layout}"):
            continue
        timed = operations(workload, dtype)
        copy, read = timed.pop("copy").cubn, timed.pop("read").cubn
        (once,) = (1e3 * t for t in alternate([read], turns))
        for name, operation in timed.items():
            copied, ours, theirs = (1e3 * t for t in alternate([copy, operation.cubn, operation.torch], turns))
            row = {"array": workload.name, "shape": workload.shape, "layout": workload.layout, "operation": name}
            rows.append(row | {"read_ms": once, "copy_ms": copied, "cubn_ms": ours, "torch_ms": theirs})
            print(
                f"{workload.name:<14} {workload.layout:<5} {name:<17} {ours:8.3f} ms"
                f" = {ours / copied:5.2f} copies, {theirs / ours:5.2f} x torch",
                flush=True,
            )
    return rows


def table(path: Path) -> str:
    """The headline arrays of a result file as Markdown: each operation as "copies (times torch's speed)", and reading
    the array once as copies.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["array"] not in HEADLINE:
            continue
        text = f"{row['cubn_ms'] / row['copy_ms']:.2f} ({row['torch_ms'] / row['cubn_ms']:.1f}×)"
        of_array = cells.setdefault((row["array"], row["layout"]), {})
        of_array |= {row["operation"]: text, "read": f"{row['read_ms'] / row['copy_ms']:.2f}"}
    columns = ("read", *COLUMNS)
    lines = [f"| array | layout | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    lines += [f"| {array} | {layout} | {' | '.join(r[c] for c in columns)} |" for (array, layout), r in cells.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    rows = measure(options.only, getattr(torch, options.dtype), options.turns)
    if options.only:
        return
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    header: dict[str, object] = {"threads": THREADS, "dtype": options.dtype, "turns": options.turns}
    print("written:", write(f"cpu{suffix}.json", header, rows))


if __name__ == "__main__":
    main()
