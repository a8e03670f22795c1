"""The GPU suite: kernel time of each operation as a multiple of a copy's; host overhead; first calls."""

import os
import subprocess
import sys
import tempfile

import torch

import cubn

from .device import LAYERS, OPERATIONS, measure, require_device

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NAMED = {f"{workload.name} {workload.layout}": workload for workload in LAYERS}


class Kernels:
    """Time over that of a copy of as many bytes as must move where a channel stays on chip: 1 is the floor."""

    params = (list(NAMED), list(DTYPES), list(OPERATIONS))
    param_names = ("array", "dtype", "operation")

    def setup(self, array: str, dtype: str, operation: str) -> None:
        require_device()

    def track_over_copy(self, array: str, dtype: str, operation: str) -> float:
        times, _ = measure(NAMED[array], DTYPES[dtype], operation, ("copy", "cubn"))
        return times["cubn"] / times["copy"]

    track_over_copy.unit = "copies"


class DeviceOverhead:
    """The host's time of a call: its arrays have one element, or two where training needs them."""

    params = (["torch", "cupy"],)
    param_names = ("library",)

    def setup(self, library: str) -> None:
        require_device()
        if library == "torch":
            one, two = torch.ones(1, 1, device="cuda"), torch.ones(2, 1, device="cuda")
            self.wait = torch.cuda.synchronize
        else:
            import cupy

            one, two = cupy.ones((1, 1), "f4"), cupy.ones((2, 1), "f4")
            self.wait = cupy.cuda.runtime.deviceSynchronize
        self.one, self.two, self.state = one, two, cubn.BatchNormState(1, like=one)
        _, self.saved = cubn.forward_train(two, self.state)
        self.time_forward(library)
        self.time_backward(library)
        self.wait()

    def time_forward(self, library: str) -> None:
        cubn.forward(self.one, self.state)

    def time_forward_train(self, library: str) -> None:
        cubn.forward_train(self.two, self.state)

    def time_backward(self, library: str) -> None:
        cubn.backward(self.two, self.saved)


class FirstDeviceCall:
    """The first call in a new process, without imports and the device's own start; with an empty and a filled cache."""

    params = (["forward", "forward_train", "moments"], ["empty", "filled"])
    param_names = ("operation", "cache")
    timeout = 300

    def setup(self, operation: str, cache: str) -> None:
        require_device()

    def track_first_call(self, operation: str, cache: str) -> float:
        return first_call(operation, cache)

    track_first_call.unit = "s"


def first_call(operation: str, cache: str) -> float:
    """Seconds."""
    argument = "x" if operation == "moments" else "x, cubn.BatchNormState(8, like=x)"
    code = (
        "import time, cupy, cubn, numpy as np; from cupy.cuda.runtime import deviceSynchronize; "
        "x = cupy.asarray(np.ones((4, 8, 16, 16), 'f4')); deviceSynchronize(); "
        f"begin = time.perf_counter(); cubn.{operation}({argument}); deviceSynchronize(); "
        "print(time.perf_counter() - begin)"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"CUBN_CACHE_DIR": folder}
        for _ in range(1 if cache == "empty" else 2):
            run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    return float(run.stdout)
