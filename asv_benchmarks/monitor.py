"""What a monitor adds to the training step of a ResNet-20 on the digits.

    python asv_benchmarks/monitor.py            measure, print, and write results/<machine>/monitor.json
    python asv_benchmarks/monitor.py --json     print the rows as JSON, write nothing
    python asv_benchmarks/monitor.py --table FILE   the table from a result file

A step is forward, loss, backward and SGD on 32 images of 8 × 8 pixels, with torch's batch norms and with cubn's. Each
`Monitor.step` is timed where it stands in the training, in processor time of one thread: other programs disturb that
least. "share" is the median over blocks of what monitoring takes, over what the steps take; the limit is 2 %.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from benchmarks.layers import contestants
from benchmarks.models import NETWORKS, trained
from machine import write
from trees import Row, print_rows

import cubn
from cubn.health import Monitor

LIMIT = 0.02
SIZE, BATCH, BLOCK = 8, 32, 20


def measure(name: str, blocks: int) -> Row:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.tensor(digits.target)
    network = NETWORKS["resnet20"]._replace(x=(BATCH, 3, SIZE, SIZE))
    model = trained(network, "nchw", contestants(4)[name]).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    monitor = Monitor(model, on_finding=lambda found: None)

    def step() -> None:
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()

    shares, steps = [], []
    for _ in range(1 + blocks):
        seconds = dict.fromkeys((step, monitor.step), 0.0)
        for _ in range(BLOCK):
            for call in seconds:
                begin = time.process_time()
                call()
                seconds[call] += time.process_time() - begin
        training, watching = seconds.values()
        steps.append(training / BLOCK)
        shares.append(watching / training)
    share, seconds_of_step = statistics.median(shares[1:]), statistics.median(steps[1:])
    return {
        "batch_norms": name,
        "layers": len(monitor.history),
        "step_ms": round(1e3 * seconds_of_step, 3),
        "monitor_ms": round(1e3 * share * seconds_of_step, 3),
        "share": round(share, 4),
    }


def table(rows: list[Row]) -> str:
    lines = ["| batch norms | layers | step, ms | monitor, ms | share |", "|---" * 5 + "|"]
    for r in rows:
        figures = f"{r['step_ms']:.1f} | {r['monitor_ms']:.2f} | {100 * r['share']:.1f} %"
        lines.append(f"| {r['batch_norms']} | {r['layers']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, write nothing")
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    torch.set_num_threads(1)
    cubn.set_num_threads(1)
    rows = [measure(name, options.blocks) for name in ("torch", "cubn")]
    if options.json:
        print_rows(rows)
        return
    for row in rows:
        verdict = "holds" if row["share"] <= LIMIT else "DOES NOT HOLD"
        print(f"{row['batch_norms']}: {row}   <= {LIMIT:g}: {verdict}")
    print("written:", write("monitor.json", {"threads": 1, "blocks": options.blocks}, rows))


if __name__ == "__main__":
    main()
