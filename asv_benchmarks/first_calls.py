"""What a first call costs: seconds from an empty kernel cache, and from a filled one, each in a process of its own.

    python asv_benchmarks/first_calls.py    measure, write results/<machine>/first_calls.json, print the table

Wall-clock time on an idle machine. "import" is that of numpy and cubn; the first forward_train and the first backward
compile (or load) their kernels, and those of the thread pool; the second calls show what is left without that. The
least of several runs.
"""

import json
import os
import subprocess
import sys
import tempfile

from machine import write

import cubn

RUNS = 3
CASES = (
    ((32, 64, 56, 56), 1, "float32", False),
    ((32, 56, 56, 64), -1, "float32", False),
    ((32, 64, 7, 7), 1, "float32", False),
    ((4096, 1024), 1, "float32", False),
    ((32, 64, 56, 56), 1, "float16", True),
    ((32, 56, 56, 64), -1, "float16", True),
)
PROGRAM = """
import json, time
begin = time.perf_counter()
import numpy as np
import cubn
seconds = {{"import": time.perf_counter() - begin}}
x = np.random.default_rng(0).standard_normal({shape}, dtype=np.float32).astype({dtype!r})
state = cubn.BatchNormState(x.shape[{axis}], channel_axis={axis})
options = {{"relu": True, "residual": x.copy()}} if {fused} else {{}}
for ordinal in ("first", "second"):
    begin = time.perf_counter()
    y, saved = cubn.forward_train(x, state, **options)
    seconds[f"{{ordinal}} forward_train"] = time.perf_counter() - begin
    begin = time.perf_counter()
    cubn.backward(y, saved)
    seconds[f"{{ordinal}} backward"] = time.perf_counter() - begin
print(json.dumps(seconds))
"""


def run(program: str, cache: str) -> dict[str, float]:
    """Seconds of each step, in a new process."""
    environment = os.environ | {"CUBN_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(shape: tuple[int, ...], axis: int, dtype: str, fused: bool) -> dict[str, object]:
    program = PROGRAM.format(shape=shape, axis=axis, dtype=dtype, fused=fused)
    cold, warm = [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(run(program, cache))
            warm.append(run(program, cache))
    least = {
        name: {step: round(min(r[step] for r in runs), 4) for step in runs[0]}
        for name, runs in (("empty cache", cold), ("filled cache", warm))
    }
    return {"shape": shape, "channel_axis": axis, "dtype": dtype, "residual and relu": fused, **least}


def main() -> None:
    rows = [measure(*case) for case in CASES]
    path = write("first_calls.json", {"runs": RUNS, "threads": cubn.get_num_threads()}, rows)
    print(path)
    steps = ("import", "first forward_train", "first backward")
    print(f"| array | | {' | '.join(f'{step}, {cache}' for cache in ('empty', 'filled') for step in steps)} |")
    print("|---" * 8 + "|")
    for row in rows:
        cells = [f"{row[f'{cache} cache'][step]:.2f}" for cache in ("empty", "filled") for step in steps]
        what = row["dtype"] + (", residual and ReLU" if row["residual and relu"] else "")
        print(f"| {row['shape']} | {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
