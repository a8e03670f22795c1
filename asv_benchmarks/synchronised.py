"""The cost of `comm=` for the 53 normalisations of ResNet-50, and of what it is made of.

    python asv_benchmarks/synchronised.py                 measure with mpiexec, write synchronised.json, print the table
    python asv_benchmarks/synchronised.py --only layers   one of layers, messages, merges; the others stay as they were
    python asv_benchmarks/synchronised.py --table FILE    the table from a result file

"layers": each rank has two float32 images and one thread. A figure is the sum over the 53 layers of the median time of
a call on the slowest rank: the training forward or the backward without `comm`, the same with it ("declared": and with
sizes=), and the two gathers it makes (64 bytes; 16 C + 8 bytes) by MPI.Allgather alone. "together" has all forwards of
one shape in one message. torch's SyncBatchNorm does not take CPU tensors, so it has no column.
"messages": MPI.Allgather, and Sendrecv with the neighbours, of records of so many bytes. "merges": the root of so many
nodes of C channels. What these come to on many ranks is computed by cost_of_ranks.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from machine import RESULTS, machine, write

import cubn
from cubn._types import CPU, Nodes
from cubn.backends import backend_for

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
COLUMNS = (
    "forward alone",
    "forward comm",
    "forward declared",
    "backward alone",
    "backward comm",
    "bare gathers",
    "together",
)
MESSAGES = [8, 64, 1032, 8200, 32776, 262152, 1 << 20]
CHANNELS = [64, 512, 2048]
NODES = [2, 16, 128]

Row = dict[str, object]


def microseconds(call: Callable[[], object], repeats: int, start: Callable[[], object], slowest: Callable) -> float:
    """The median over repeats of a call's time on the slowest rank; `start` lets all begin together."""
    times = []
    for _ in range(5 + repeats):
        start()
        begin = time.perf_counter()
        call()
        times.append(slowest(time.perf_counter() - begin))
    return statistics.median(times[5:]) * 1e6


def layers(comm: object, timed: Callable) -> Iterator[Row]:
    rng = np.random.default_rng(comm.rank)
    totals = dict.fromkeys(COLUMNS, 0.0)
    sizes = [IMAGES] * comm.size
    for (C, extent), count in LAYERS.items():
        x, dy = rng.standard_normal((2, IMAGES, C, extent, extent), dtype=np.float32)
        y, dx = np.zeros_like(x), np.zeros_like(x)
        state = cubn.BatchNormState(C)
        records = [(np.zeros(n, np.uint8), np.zeros((comm.size, n), np.uint8)) for n in (64, 16 * C + 8)]
        _, saved = cubn.forward_train(x, state, out=y, comm=comm)
        _, alone = cubn.forward_train(x, state, out=y)

        def together(x=x, state=state, count=count):
            with cubn.together(comm):
                started = [cubn.forward_train_start(x, state, comm=comm) for _ in range(count)]
            for one in started:
                one.finish()

        def forward(x=x, y=y, state=state, **options):
            cubn.forward_train(x, state, out=y, **options)

        calls = {
            "forward alone": forward,
            "forward comm": lambda forward=forward: forward(comm=comm),
            "forward declared": lambda forward=forward: forward(comm=comm, sizes=sizes),
            "backward alone": lambda dy=dy, dx=dx, alone=alone: cubn.backward(dy, alone, out=dx),
            "backward comm": lambda dy=dy, dx=dx, saved=saved: cubn.backward(dy, saved, out=dx),
            "bare gathers": lambda records=records: [comm.Allgather(*record) for record in records],
        }
        for name, call in calls.items():
            totals[name] += count * timed(call, 21)
        totals["together"] += timed(together, 7)
    yield {"what": "layers", "ranks": comm.size, **{name: round(total) for name, total in totals.items()}}


def messages(comm: object, timed: Callable) -> Iterator[Row]:
    for n in MESSAGES:
        sent, received = np.zeros(n, np.uint8), np.zeros((comm.size, n), np.uint8)
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        calls = {
            "allgather": lambda sent=sent, received=received: comm.Allgather(sent, received),
            "sendrecv": lambda sent=sent, row=received[0], to=right, of=left: comm.Sendrecv(
                sent, to, recvbuf=row, source=of
            ),
        }
        for name, call in calls.items():
            us = timed(call, 201 if n < 1 << 17 else 41)
            yield {"what": name, "ranks": comm.size, "bytes": n, "us": round(us, 2)}


def merges(comm: object, timed: Callable) -> Iterator[Row]:
    """On one rank: the others would only be in the way."""
    backend = backend_for((CPU, 0))
    for C in CHANNELS:
        for count in NODES:
            table = np.ones((count, 2 * C + 1))
            table[:, :1].view(np.int64)[:] = 100
            nodes = Nodes(tuple((i, i + 1) for i in range(count)), table)
            us = timed(lambda nodes=nodes: backend.root(nodes), 101)
            yield {"what": "merges", "channels": C, "nodes": count, "us": round(us, 2)}


WHAT = {"layers": (layers, RANKS), "messages": (messages, RANKS), "merges": (merges, (1,))}


def rank(what: str) -> None:
    """What each rank measures; the first prints it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    cubn.set_num_threads(1)

    def timed(call: Callable[[], object], repeats: int) -> float:
        return microseconds(call, repeats, comm.Barrier, lambda t: comm.allreduce(t, op=MPI.MAX))

    rows = list(WHAT[what][0](comm, timed))
    if comm.rank == 0:
        print(json.dumps(rows))


def measure(what: str) -> list[Row]:
    rows: list[Row] = []
    for ranks in WHAT[what][1]:
        options = ["--oversubscribe", "--allow-run-as-root"]
        command = ["mpiexec", *options, "-n", str(ranks), sys.executable, "-m", "mpi4py", __file__, "--rank", what]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows += json.loads(run.stdout.splitlines()[-1])
    return rows


def kind(row: Row) -> str:
    """Which measurement a row is of."""
    return "messages" if row["what"] in ("allgather", "sendrecv") else str(row["what"])


def table(rows: list[Row]) -> str:
    lines = [f"| ranks | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    of_layers = [row for row in rows if row["what"] == "layers"]
    lines += [f"| {row['ranks']} | {' | '.join(f'{row[name] / 1e3:.1f}' for name in COLUMNS)} |" for row in of_layers]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WHAT, help="measure this, and keep the rest of the result file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table from this result file")
    parser.add_argument("--rank", choices=WHAT, help="be one of the ranks")
    options = parser.parse_args()
    if options.rank:
        rank(options.rank)
        return
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    path = RESULTS / machine() / "synchronised.json"
    old = json.loads(path.read_text())["rows"] if options.only and path.exists() else []
    new = {what: measure(what) for what in WHAT if options.only in (None, what)}
    rows = [row for what in WHAT for row in new.get(what, [row for row in old if kind(row) == what])]
    print(write("synchronised.json", {"images": IMAGES, "threads": 1, "mpi": library(), "unit": "microseconds"}, rows))
    print(table(rows))


def library() -> str:
    """The MPI that was measured."""
    program = "from mpi4py import MPI; print(MPI.Get_library_version().split(',')[0])"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
