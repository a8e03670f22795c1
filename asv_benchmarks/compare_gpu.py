"""Measure cubn on a CUDA device next to torch's kernels, cuDNN and torch.compile, turn by turn in one process.

    python asv_benchmarks/compare_gpu.py                                every array, dtype, operation and contestant
    python asv_benchmarks/compare_gpu.py --contestants copy cubn        some of these
    python asv_benchmarks/compare_gpu.py --layers --operations backward --only '@56² x 256'
    python asv_benchmarks/compare_gpu.py --once --part 3 14             cubn's calls once each: their kernels, compiled
    python asv_benchmarks/compare_gpu.py --host                         the host's time of a call, and first calls

Prints a JSON object for each measurement, what matters most first. A row has milliseconds of each contestant; of a copy
that moves the bytes which must move where a channel stays on chip, `copy`; `share`: of its bandwidth that cubn reaches
on these, and `share_of_passes` on those of two passes. Arrays are larger than the caches and take turns. torch.compile
takes seconds an array and is measured for four.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from benchmarks.device import CONTESTANTS, LAYERS, OPERATIONS, WORKLOADS, arrays, measure, require_device, with_cubn
from benchmarks.gpu import DTYPES, DeviceOverhead, first_call
from benchmarks.workloads import Workload

FIRST = re.compile(r"^(64@112|256@56|512@28|1024@14|2048@7)²")
COMPILED = re.compile(r"^(256@56|1024@14)² x 32$")
FLAGS = {"backends.cudnn.enabled": True, "backends.cudnn.benchmark": False, "backends.cudnn.deterministic": False}


class Case(NamedTuple):
    """A row."""

    workload: Workload
    dtype: str
    operation: str

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile is measured."""
        named = COMPILED.match(self.workload.name) and self.workload.layout == "nchw"
        return bool(named) and self.dtype == "bfloat16" and self.operation in ("forward_train", "backward")

    @property
    def names(self) -> dict[str, str]:
        workload = self.workload
        return {"array": workload.name, "layout": workload.layout, "dtype": self.dtype, "operation": self.operation}


def header() -> dict[str, object]:
    """The device, its software as torch knows it, and the flags that are set."""
    properties = torch.cuda.get_device_properties(0)
    return {
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


def row_of(case: Case, contestants: list[str]) -> dict[str, object]:
    times, refused = measure(case.workload, DTYPES[case.dtype], case.operation, contestants)
    row: dict[str, object] = {f"{name}_ms": round(value, 6) for name, value in times.items()}
    if {"copy", "cubn"} <= times.keys():
        operation = OPERATIONS[case.operation]
        share = times["copy"] / times["cubn"]
        row["share"] = round(share, 3)
        row["share_of_passes"] = round(share * operation.passes / operation.floor, 3)
    return row | ({"refused": refused} if refused else {})


def call_once(case: Case) -> dict[str, object]:
    """Compile the kernels, into CuPy's cache."""
    with_cubn(case.operation, arrays(case.workload, DTYPES[case.dtype]))()
    torch.cuda.synchronize()
    return {"called": True}


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


def attempt(names: dict[str, str], measure: Callable[[], dict[str, object]]) -> bool:
    """Print what is measured, or why it is not: one number lost, not the run. Whether it was measured."""
    try:
        found = measure()
    except Exception as error:
        reason = getattr(error, "stderr", None) or error  # of a child process
        found = {"error": f"{type(error).__name__}: {reason}"[-300:]}
    print(json.dumps({**names, **found}, ensure_ascii=False), flush=True)
    return "error" not in found


def planned(options: argparse.Namespace) -> list[Case]:
    """The cases in order of worth: 16-bit floats, and a layer of each extent, first."""
    cases = [
        Case(workload, dtype, operation)
        for dtype in options.dtypes
        for workload in (LAYERS if options.layers else WORKLOADS)
        if re.search(options.only, f"{workload.name} {workload.layout}")
        for operation in options.operations
    ]
    if "cubn" not in options.contestants and "compile" in options.contestants:
        cases = [case for case in cases if case.is_compiled]
    part, parts = options.part
    return sorted(cases, key=lambda case: (case.dtype != "bfloat16", not FIRST.match(case.workload.name)))[part::parts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--layers", action="store_true", help="of ResNet-50 only")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("PART", "PARTS"))
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--from", type=int, default=0, dest="begin", help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_device()
    set_flags()
    if options.host:
        measured = [
            attempt({"measured": "microseconds of a call"}, host_overhead),
            attempt({"measured": "seconds of a first call"}, first_calls),
        ]
        return int(not all(measured))
    if not options.begin:
        attempt({}, header)
    cases = planned(options)
    for number in range(options.begin, len(cases)):
        case = cases[number]
        contestants = [name for name in options.contestants if name != "compile" or case.is_compiled]
        one = partial(call_once, case) if options.once else partial(row_of, case, contestants)
        if not attempt(
            case.names, one
        ):  # after some errors a process can do nothing more on the device: another goes on
            os.execv(sys.executable, [*sys.orig_argv, "--from", str(number + 1)])
        torch.cuda.empty_cache()
    return int(options.begin > 0)


if __name__ == "__main__":
    sys.exit(main())
