"""Tests that need a CUDA device and CuPy, some PyTorch or JAX. Without these they are skipped, and the summary says so.

With CUBN_REQUIRE_GPU=1 in the environment they fail instead: a machine that is meant to run them never passes silently.
"""

import os

import pytest

from tests.backends import forget_backends
from tests.gpu import device_arrays
from tests.gpu.needs import missing, need
from tests.ops import arrays

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX leaves memory for the others


@pytest.fixture(autouse=True)
def cuda_device(request):
    """What is marked so needs one, with all work of the test before done."""
    if request.node.get_closest_marker("gpu"):
        need("cupy")
        import cupy

        cupy.cuda.runtime.deviceSynchronize()


@pytest.fixture
def torch_device():
    need("torch")


@pytest.fixture(params=["Torch", "Cupy"])
def library(request):
    """One of tests.gpu.queues."""
    from tests.gpu import queues

    return getattr(queues, request.param)()


@pytest.fixture
def on_device(monkeypatch):
    """Bodies written for the CPU run on the device: what they carry to NumPy goes to CuPy."""
    for name in ("carry", "store_of", "library_of"):
        monkeypatch.setattr(arrays, name, getattr(device_arrays, name))
    forget_backends()


def pytest_terminal_summary(terminalreporter):
    reason = missing("cupy") or missing("torch")
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if r.nodeid.startswith("tests/gpu/")]
    if skipped and reason:
        terminalreporter.section("GPU tests")
        terminalreporter.line(f"NOT RUN, {len(skipped)} of them: {reason}")
