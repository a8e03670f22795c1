"""Count the cycles that the CPU kernels take for each element, on processors that need not be there.

    python asv_benchmarks/cycles.py                       every processor, in float32, into results/by-processor/
                                                          cycles.json and docs/cpu.md
    python asv_benchmarks/cycles.py --dtype bfloat16      another type, into cycles-bfloat16.json
    python asv_benchmarks/cycles.py --contracts           what other contracts would take, into contracts.json
                                                          and docs/decisions/
    python asv_benchmarks/cycles.py --processor znver4    one processor; prints, writes nothing
    python asv_benchmarks/cycles.py --only 'moments nhwc' what matches; prints, writes nothing
    python asv_benchmarks/cycles.py --against TREE        before (in another source tree) and after (in this one)
    python asv_benchmarks/cycles.py --table FILE          the tables of docs/cpu.md or decision 12, from a result file

It needs llvm-mca, LLVM's static analyser (apt-get install llvm-19), and takes some minutes a processor.

Kernels are compiled for each processor. On this machine they run over small arrays, which shows the way they take, and
the machine code on that way is what llvm-mca simulates, from beginning to end: with all data in the first cache, all
jumps foreseen, and nothing known of the time until what was stored can be read. `bound` is for how long the busiest
part of the processor is taken. Beside the kernels stand plain loops (plain.py), which compute what a framework's do.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from contracts import CONTRACTS
from cycle_tables import CONTRACT, CPU, DETAILED, PLAIN, called, line, replaced_in, tables
from machine import write
from throughput import PROCESSORS, analyser, version
from trees import in_turns, print_rows, rows_of, tree

FOLDER = "by-processor"


def compare_trees(names: Sequence[str], arguments: Sequence[str], other: Path) -> None:
    """Print each kernel's figures before (in the other tree) and after (in this)."""
    for name in names:
        ((after, before),) = in_turns(__file__, [f"--processor={name}", *arguments], other, 1)
        found, changes = {called(r): r for r in before if r["array"] != PLAIN}, []
        for r in after:
            if old := found.get(called(r)):
                figures = ", ".join(
                    f"{old[f]:.3f} -> {r[f]:.3f} {f}" for f in ("cycles", "bound", "instructions", "stack")
                )
                changes.append(r["cycles"] / old["cycles"])
                print(f"{name:<15} {called(r):<38} {figures}: {changes[-1]:.2f} of the cycles", flush=True)
        print(f"{name}: geometric mean {math.exp(sum(map(math.log, changes)) / len(changes)):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--processor", choices=tuple(PROCESSORS), action="append")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--contract", default="", choices=tuple(CONTRACTS))
    parser.add_argument("--contracts", action="store_true")
    parser.add_argument("--against", type=Path, metavar="TREE")
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, write nothing")
    options = parser.parse_args()
    if options.table:
        print(tables(options.table))
        return
    analyser()
    names = options.processor or list(DETAILED if options.contracts else PROCESSORS)
    arguments = [f"--dtype={options.dtype}", f"--only={options.only}"]
    if options.json:  # in a process of its own, which has no kernels of another processor or contract
        from counted import counted  # takes torch, which tables do without

        (name,) = names
        print_rows([{"processor": name, **r} for r in counted(name, options.dtype, options.only, options.contract)])
    elif options.against:
        compare_trees(names, arguments, options.against)
    else:
        rows = []
        for name in names:
            for contract in CONTRACTS if options.contracts else (options.contract,):
                told = [f"--processor={name}", *([f"--contract={contract}"] if contract else []), *arguments]
                found = rows_of(__file__, told, tree())
                print(*map(line, found), sep="\n", flush=True)
                rows += [{"contract": contract, **r} if options.contracts else r for r in found]
        if not (options.only or options.processor or options.contract):
            suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
            header: dict[str, object] = {"llvm-mca": version(), "dtype": options.dtype, "processors": names}
            file = f"{'contracts' if options.contracts else 'cycles'}{suffix}.json"
            with replaced_in(CONTRACT if options.contracts else CPU, tables, f"{FOLDER}/{file}"):
                print("written:", write(file, header, rows, FOLDER))


if __name__ == "__main__":
    main()
