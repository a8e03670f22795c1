"""Rehearse a script that measures on PyTorch's CUDA device: its arrays are on the CPU, and no time means anything.

python -m tests.gpu.torch_on_cpu SCRIPT [ARGUMENT ...]
"""

import contextlib
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """What is asked for on the device "cuda" is made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


class Stream:
    def wait_stream(self, other):
        """All is done at once."""


class Event:
    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        """It is done."""

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Graph:
    """What is captured is run at once instead."""

    def replay(self):
        """Nothing."""


@contextlib.contextmanager
def entered(*_, **__):
    yield


STAND_INS = {
    "CUDAGraph": Graph,
    "Event": Event,
    "Stream": Stream,
    "current_stream": Stream,
    "empty_cache": lambda: None,
    "get_device_properties": lambda index: SimpleNamespace(
        major=9, minor=0, multi_processor_count=2, L2_cache_size=1 << 20
    ),
    "graph": entered,
    "is_available": lambda: True,
    "stream": entered,
    "synchronize": lambda: None,
}


def main(script, arguments):
    for name, stand_in in STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    with OnCpu():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
