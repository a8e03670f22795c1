"""Measure cubn on a CUDA device next to torch's kernels, cuDNN and torch.compile, turn by turn in one process.

    python asv_benchmarks/compare_gpu.py                        into asv_benchmarks/results/<device>/gpu.json
    python asv_benchmarks/compare_gpu.py --out FOLDER           into FOLDER/gpu.json
    python asv_benchmarks/compare_gpu.py --seconds 150          stop then; what is left out is counted in the file
    python asv_benchmarks/compare_gpu.py --only '@56² x 256'    only what matches

Every row has milliseconds of a copy of x to y, of cubn and of the others; `share`: of the copy's bandwidth that cubn
reaches on the bytes that must move where a channel stays on chip, and `share_of_passes` on those of two passes. Arrays
are larger than the caches and take turns. torch.compile takes seconds an array and is measured for a few.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmarks.device import OPERATIONS, WORKLOADS, measure, require_device
from benchmarks.gpu import DTYPES, DeviceOverhead, first_call
from benchmarks.workloads import Workload
from gpu_machine import folder, found
from machine import RESULTS

FIRST = re.compile(r"^(64@112|256@56|512@28|1024@14|2048@7)²")
COMPILED = re.compile(r"^(256@56|1024@14)² x 32$")
FLAGS = {"backends.cudnn.enabled": True, "backends.cudnn.benchmark": False, "backends.cudnn.deterministic": False}


def header() -> dict[str, object]:
    """The device, the software, and the flags that are set."""
    properties = torch.cuda.get_device_properties(0)
    return found() | {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "flags": FLAGS,
    }


def set_flags() -> None:
    for name, value in FLAGS.items():
        _, module, flag = name.split(".")
        setattr(getattr(torch.backends, module), flag, value)


def row_of(workload: Workload, dtype: str, operation: str) -> dict[str, object]:
    compiled = COMPILED.match(workload.name) and workload.layout == "nchw" and dtype == "bfloat16"
    names = ("copy", "cubn", "torch", "cudnn", *(["compile"] if compiled else []))
    times, refused = measure(workload, DTYPES[dtype], operation, names)
    bytes_moved = OPERATIONS[operation]
    share = times["copy"] / times["cubn"] / 2
    return {
        "array": workload.name,
        "shape": workload.shape,
        "layout": workload.layout,
        "dtype": dtype,
        "operation": operation,
        **{f"{name}_ms": round(value, 6) for name, value in times.items()},
        "share": round(bytes_moved.floor * share, 3),
        "share_of_passes": round(bytes_moved.passes * share, 3),
        **({"refused": refused} if refused else {}),
    }


def host_overhead() -> dict[str, float]:
    """Microseconds of a call whose arrays have an element or two."""
    microseconds = {}
    for library in ("torch", "cupy"):
        calls = DeviceOverhead()
        calls.setup(library)
        for name in ("forward", "forward_train", "backward"):
            call, times = getattr(calls, f"time_{name}"), []
            for _ in range(20):
                begin = time.perf_counter()
                for _ in range(50):  # few enough for the queue
                    call(library)
                times.append((time.perf_counter() - begin) / 50)
                calls.wait()
            microseconds[f"{library} {name}"] = round(1e6 * sorted(times)[len(times) // 2], 2)
    return microseconds


def first_calls() -> dict[str, float]:
    """Seconds."""
    return {
        f"{name}, {cache} cache": round(first_call(name, cache), 3)
        for name in ("forward", "forward_train")
        for cache in ("empty", "filled")
    }


def attempt(measure: Callable[[], object]) -> object:
    """What is measured, or why it is not: one number lost, not the run."""
    try:
        return measure()
    except Exception as error:
        reason = getattr(error, "stderr", None) or error  # of a child process
        return f"{type(error).__name__}: {reason}"[-300:]


def write(path: Path, head: dict[str, object], rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
    path.write_text(f'{json.dumps(head, indent=2)[:-2]},\n  "rows": [\n{body}\n  ]\n}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    require_device()
    set_flags()
    end = time.monotonic() + options.seconds
    path = (options.out or RESULTS / folder()) / "gpu.json"
    head = header() | {"host_overhead_us": attempt(host_overhead), "first_call_s": attempt(first_calls)}
    planned = [
        (workload, dtype, operation)
        for workload in WORKLOADS
        if re.search(options.only, f"{workload.name} {workload.layout}")
        for dtype in DTYPES
        for operation in OPERATIONS
    ]
    planned.sort(key=lambda case: not FIRST.match(case[0].name))
    rows: list[dict[str, object]] = []
    for number, case in enumerate(planned):
        if time.monotonic() > end:
            head["left_out_for_time"] = len(planned) - number
            break
        row = attempt(partial(row_of, *case))
        if not isinstance(row, dict):
            names = {"array": case[0].name, "layout": case[0].layout, "dtype": case[1], "operation": case[2]}
            row = names | {"error": row}
        rows.append(row)
        torch.cuda.empty_cache()
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
        if number % 25 == 0:  # what there is survives what may come
            write(path, head, rows)
    write(path, head, rows)
    print("written:", path)


if __name__ == "__main__":
    main()
