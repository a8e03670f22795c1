"""What a process that sleeps costs after a call: the CPU time of its other threads, in microseconds.

    python asv_benchmarks/idle.py                    measure, write results/<machine>/idle.json, print the table
    python asv_benchmarks/idle.py --case torch       one case; prints, writes nothing
    python asv_benchmarks/idle.py --threading own    with CUBN_THREADING=own
    python asv_benchmarks/idle.py --table FILE       the table from a result file

Each case is a process of its own. A few calls one after another, then the caller sleeps for 200 ms, in which the
process's CPU time minus the caller's own is that of threads that have nothing to do; median and maximum of the repeats.
"nothing" makes no call. "torch" and "numpy" are these libraries' own threads, after a ReLU and a matrix product.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import write
from processes import add_options, measured, threads
from trees import Row, print_rows

import cubn

SHAPE = (32, 64, 22, 22)  # 4 MB
CALLS, ASLEEP = 5, 0.2


def nothing() -> Callable[[], object]:
    return lambda: None


def cubn_on_numpy() -> Callable[[], object]:
    x, state = np.ones(SHAPE, np.float32), cubn.BatchNormState(SHAPE[1])
    return lambda: cubn.forward_train(x, state)


def cubn_on_torch() -> Callable[[], object]:
    torch = torch_with_threads()
    x = torch.ones(SHAPE)
    state = cubn.BatchNormState(SHAPE[1], like=x)
    return lambda: cubn.forward_train(x, state)


def torch_alone() -> Callable[[], object]:
    return torch_with_threads().ones(SHAPE).relu


def numpy_alone() -> Callable[[], object]:
    x = np.ones((1024, 1024), np.float32)
    return lambda: x @ x


def torch_with_threads():
    import torch

    torch.set_num_threads(cubn.get_num_threads())
    return torch


CASES = {
    "nothing": nothing,
    "cubn on NumPy": cubn_on_numpy,
    "cubn on torch": cubn_on_torch,
    "torch": torch_alone,
    "numpy": numpy_alone,
}


def measure(case: str, repeats: int) -> Row:
    call = CASES[case]()
    call()  # loads kernels, starts threads
    microseconds = [1e6 * after(call) for _ in range(repeats)]
    figures = {"median_us": statistics.median(microseconds), "max_us": max(microseconds)}
    return {"case": case, **{key: round(x, 1) for key, x in figures.items()}, "cubn_threads": threads()}


def after(call: Callable[[], object]) -> float:
    """Seconds that other threads compute while the caller sleeps."""
    for _ in range(CALLS):
        call()
    begin = of_others()
    time.sleep(ASLEEP)
    return of_others() - begin


def of_others() -> float:
    """The CPU time of all threads but this one."""
    return time.process_time() - time.thread_time()


def table(rows: list[Row]) -> str:
    lines = ["| after | median, µs | largest, µs | cubn's threads |", "|---" * 4 + "|"]
    lines += [f"| {r['case']} | {r['median_us']:.0f} | {r['max_us']:.0f} | {r['cubn_threads']} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--table", type=Path, metavar="FILE")
    add_options(parser)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    if options.here:
        print_rows([measure(options.case, options.repeats)])
        return
    cases = [options.case] if options.case else list(CASES)
    repeats = f"--repeats={options.repeats}"
    rows = [measured(__file__, [f"--case={case}", repeats], options.threading) for case in cases]
    if options.json:
        print_rows(rows)
        return
    print(table(rows))
    if not options.case:
        header = {"threading": options.threading, "repeats": options.repeats}
        print("written:", write("idle.json", header, rows))


if __name__ == "__main__":
    main()
