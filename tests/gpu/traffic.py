"""The bytes that kernels move to and from device memory, as Nsight Compute counts them, next to those that must move.

python -m tests.gpu.traffic

Prints a JSON object for each launch. That the tool is not installed, or may not read the counters, is a result, not a
failure.
"""

import csv
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.gpu.tools import path_of
from tests.ops import arrays

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
REFUSED = re.compile(r"^==ERROR== (.*)$", re.MULTILINE)


class Layer(NamedTuple):
    shape: tuple[int, ...]
    layout: str


LAYERS = (
    Layer((32, 256, 56, 56), "dense"),
    Layer((32, 256, 56, 56), "channels_last"),
    Layer((256, 1024, 14, 14), "dense"),
    Layer((256, 256, 56, 56), "channels_last"),  # two passes
)


def launch(record_to):
    """Every layer's training step and gradient once, in bfloat16: no kernel is launched but cubn's.

    Writes down, in the order of the launches, what each belongs to.
    """
    import cubn
    from cubn.backends.cuda.cupy_device import CupyDevice
    from tests.gpu import device_arrays

    launched, current = [], {}
    forward = CupyDevice.launch

    def noted(self, launch, *arguments):
        launched.append({**current, "kernel": launch.kernel})
        return forward(self, launch, *arguments)

    CupyDevice.launch = noted
    rng = np.random.default_rng(0)
    for layer in LAYERS:
        store = rng.integers(0x3F00, 0x4000, layer.shape, np.uint16)  # from 0.5 to 2
        x = device_arrays.to_cupy(arrays.in_memory(store, layer.layout, 1))
        state = cubn.BatchNormState(layer.shape[1], like=x)
        size = 2 * math.prod(layer.shape)
        names = {"shape": layer.shape, "layout": layer.layout}
        current = names | {"operation": "forward_train", "must_read": size, "must_write": size}
        _, saved = cubn.forward_train(x, state)
        current = names | {"operation": "backward", "must_read": 2 * size, "must_write": size}
        cubn.backward(x, saved)
    Path(record_to).write_text(json.dumps(launched))


def counted(text):
    """The rows of the tool's table: by launch, the counters' values."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    _units, *rows = csv.DictReader(line for line in lines[begin:] if line.startswith('"'))
    return [{name: float(row[name].replace(",", "")) for name in COUNTERS} for row in rows]


def main():
    program = path_of("ncu")
    if program is None:
        print(json.dumps({"refused": "ncu is not installed"}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "launched.json"
        command = [program, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
        run = subprocess.run(
            [*command, "--metrics", ",".join(COUNTERS), sys.executable, "-m", "tests.gpu.traffic", str(record)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        said = run.stdout + run.stderr
        launched = json.loads(record.read_text()) if record.exists() else []
    rows = counted(run.stdout)
    if not rows:
        refused = REFUSED.search(said)
        print(json.dumps({"refused": refused[1]} if refused else {"error": said[-1000:]}))
        return 0 if refused else 1
    for names, row in zip(launched, rows, strict=len(launched) == len(rows)):
        print(json.dumps(names | row))
    return int(len(launched) != len(rows))


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1]) if sys.argv[1:] else main())
