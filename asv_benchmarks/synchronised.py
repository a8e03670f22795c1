"""The cost of `comm=` for the 53 normalisations of ResNet-50, against a bare allgather of the same bytes.

    python asv_benchmarks/synchronised.py                 measure with mpiexec, write synchronised.json, print the table
    python asv_benchmarks/synchronised.py --table FILE    the table from a result file

Each rank has two float32 images and one thread. A figure is the sum over the 53 layers of the median time of a call on
the slowest rank: the training forward or the backward without `comm`, the same with it, and the two gathers it makes
(64 bytes; 16 C + 8 bytes) by MPI.Allgather alone. "started" has all forwards of one shape in one message (`together`).
torch's SyncBatchNorm does not take CPU tensors, so it has no column.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import write

import cubn

IMAGES = 2
RANKS = (2, 4)
LAYERS = {  # (channels, extent): how many of the network's normalisations
    (64, 112): 1,
    (64, 56): 6,
    (256, 56): 4,
    (128, 56): 1,
    (128, 28): 7,
    (512, 28): 5,
    (256, 28): 1,
    (256, 14): 11,
    (1024, 14): 7,
    (512, 14): 1,
    (512, 7): 5,
    (2048, 7): 4,
}
COLUMNS = ("forward alone", "forward comm", "backward alone", "backward comm", "bare gathers", "together")


def median_on_the_slowest(comm: object, call: Callable[[], object], repeats: int = 25) -> float:
    """Microseconds of a call that all ranks begin together; the median over repeats of the slowest rank's time."""
    times = []
    for _ in range(5 + repeats):
        comm.Barrier()
        begin = time.perf_counter()
        call()
        times.append(comm.allreduce(time.perf_counter() - begin, op=max))
    return statistics.median(times[5:]) * 1e6


def rank() -> None:
    """What each rank measures; the first prints it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    cubn.set_num_threads(1)
    rng = np.random.default_rng(comm.rank)
    totals = dict.fromkeys(COLUMNS, 0.0)
    for (C, extent), layers in LAYERS.items():
        x, dy = rng.standard_normal((2, IMAGES, C, extent, extent), dtype=np.float32)
        y, dx = np.zeros_like(x), np.zeros_like(x)
        state = cubn.BatchNormState(C)
        records = [(np.zeros(n, np.uint8), np.zeros((comm.size, n), np.uint8)) for n in (64, 16 * C + 8)]
        _, saved = cubn.forward_train(x, state, out=y, comm=comm)
        _, alone = cubn.forward_train(x, state, out=y)

        def together(x=x, state=state, layers=layers):
            with cubn.together(comm):
                started = [cubn.forward_train_start(x, state, comm=comm) for _ in range(layers)]
            for one in started:
                one.finish()

        calls = {
            "forward alone": lambda x=x, y=y, state=state: cubn.forward_train(x, state, out=y),
            "forward comm": lambda x=x, y=y, state=state: cubn.forward_train(x, state, out=y, comm=comm),
            "backward alone": lambda dy=dy, dx=dx, alone=alone: cubn.backward(dy, alone, out=dx),
            "backward comm": lambda dy=dy, dx=dx, saved=saved: cubn.backward(dy, saved, out=dx),
            "bare gathers": lambda records=records: [comm.Allgather(*record) for record in records],
        }
        for name, call in calls.items():
            totals[name] += layers * median_on_the_slowest(comm, call)
        totals["together"] += median_on_the_slowest(comm, together, 10)
    if comm.rank == 0:
        print(json.dumps({"ranks": comm.size, **{name: round(total) for name, total in totals.items()}}))


def measure() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for ranks in RANKS:
        options = ["--oversubscribe", "--allow-run-as-root"]
        command = ["mpiexec", *options, "-n", str(ranks), sys.executable, "-m", "mpi4py", __file__, "--rank"]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    return rows


def table(rows: list[dict[str, object]]) -> str:
    lines = [f"| ranks | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {row['ranks']} | {' | '.join(f'{row[name] / 1e3:.1f}' for name in COLUMNS)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", type=Path, help="print the table from this result file")
    parser.add_argument("--rank", action="store_true", help="be one of the ranks")
    options = parser.parse_args()
    if options.rank:
        rank()
    elif options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
    else:
        rows = measure()
        print(write("synchronised.json", {"images": IMAGES, "threads": 1, "unit": "microseconds"}, rows))
        print(table(rows))


if __name__ == "__main__":
    main()
