"""Tests that need a CUDA device, CuPy and PyTorch. Without these they are skipped, and the summary says so.

With CUBN_REQUIRE_GPU=1 in the environment they fail instead: a machine that is meant to run them never passes silently.
"""

import functools
import os

import pytest

from tests.backends import forget_backends
from tests.gpu import device_arrays
from tests.ops import arrays

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX leaves memory for the others


@functools.cache
def missing():
    """Why these tests cannot run here; empty if they can."""
    try:
        import cupy
        import torch
    except ImportError as error:
        return f"{error.name} is not installed"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device ({error})"
    return "" if torch.cuda.is_available() else "this PyTorch finds no CUDA device"


@pytest.fixture(autouse=True)
def cuda_device(request):
    """What is marked so needs one, with all work of the test before done."""
    if not request.node.get_closest_marker("gpu"):
        return
    if reason := missing():
        if os.environ.get("CUBN_REQUIRE_GPU") == "1":
            pytest.fail(f"needs a GPU: {reason}", pytrace=False)
        pytest.skip(f"needs a GPU: {reason}")
    import torch

    torch.cuda.synchronize()


@pytest.fixture
def on_device(monkeypatch):
    """Bodies written for the CPU run on the device: what they carry to NumPy goes to CuPy."""
    for name in ("carry", "store_of", "library_of"):
        monkeypatch.setattr(arrays, name, getattr(device_arrays, name))
    forget_backends()


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if r.nodeid.startswith("tests/gpu/")]
    if skipped and missing():
        terminalreporter.section("GPU tests")
        terminalreporter.line(f"NOT RUN, {len(skipped)} of them: {missing()}")
