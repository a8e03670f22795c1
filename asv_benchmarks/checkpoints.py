"""How long `python -m cubn diagnose` takes for a checkpoint of 1 GB, in seconds; and reading alone.

    python asv_benchmarks/checkpoints.py                  measure, write results/<machine>/checkpoints.json, print
    python asv_benchmarks/checkpoints.py --megabytes 100  smaller files; prints, writes nothing
    python asv_benchmarks/checkpoints.py --table FILE     the table from a result file

A network of 200 convolutions, each with a batch norm of 512 channels, is saved in a temporary folder that is deleted
afterwards. "command" is a process of its own, its start included; "read" is `cubn.health.files.read` in this one. The
first is the median and the slowest of the repeats; files are in the system's cache, as they were just written.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import write
from trees import Row

from cubn.health.files import read

LAYERS, CHANNELS = 200, 512


def tensors(megabytes: int) -> dict[str, torch.Tensor]:
    """A state_dict of this size."""
    weights = megabytes * 10**6 // (4 * LAYERS)
    found = {}
    for i in range(LAYERS):
        found[f"layers.{i}.conv.weight"] = torch.zeros(weights)
        for name, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.1), ("running_var", 1.1)):
            found[f"layers.{i}.bn.{name}"] = torch.full((CHANNELS,), value)
        found[f"layers.{i}.bn.num_batches_tracked"] = torch.tensor(1000)
    return found


def torch_zip(path: Path, saved: dict[str, torch.Tensor]) -> None:
    torch.save(saved, path)


def torch_pickles(path: Path, saved: dict[str, torch.Tensor]) -> None:
    torch.save(saved, path, _use_new_zipfile_serialization=False)


def safetensors(path: Path, saved: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(saved, path)


def npz(path: Path, saved: dict[str, torch.Tensor]) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in saved.items()})


FORMATS = {"torch, zip": torch_zip, "torch, before 1.6": torch_pickles, "safetensors": safetensors, "npz": npz}


def measure(name: str, megabytes: int, repeats: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        FORMATS[name](path, tensors(megabytes))
        size = path.stat().st_size
        command = [sys.executable, "-m", "cubn", "diagnose", str(path)]
        whole = [
            seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) for _ in range(repeats)
        ]
        alone = [seconds(lambda: read(path)) for _ in range(repeats)]
    figures = {"command_s": statistics.median(whole), "slowest_s": max(whole), "read_s": statistics.median(alone)}
    return {"format": name, "bytes": size, **{key: round(x, 4) for key, x in figures.items()}}


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def table(rows: list[Row]) -> str:
    lines = ["| format | GB | command, s | slowest, s | reading alone, s |", "|---" * 5 + "|"]
    for r in rows:
        command, slowest, alone = f"{r['command_s']:.2f}", f"{r['slowest_s']:.2f}", f"{r['read_s']:.3f}"
        lines.append(f"| {r['format']} | {r['bytes'] / 1e9:.2f} | {command} | {slowest} | {alone} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    rows = [measure(name, options.megabytes, options.repeats) for name in FORMATS]
    print(table(rows))
    if options.megabytes == parser.get_default("megabytes"):
        print("written:", write("checkpoints.json", {"repeats": options.repeats}, rows))


if __name__ == "__main__":
    main()
