"""Options and fixtures of the whole suite."""

import os
import zlib
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings

from tests.backends import forget_backends
from tests.cuda.named import PASSES, RESIDENT
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.devices import Devices
from tests.cuda_on_cpu.runner import shuffled
from tests.ops.pairwise import covering

settings.register_profile(
    "cubn", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.register_profile("ci", parent=settings.get_profile("cubn"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "cubn")


def pytest_addoption(parser):
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-seconds", type=float, default=5.0, help="how long tests/fuzz runs, all its parts together")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of tests/fuzz")


STRENGTH = {"every_value": 1, "every_pair": 2}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a product of cases, a few are run by default; the others are `full`."""
    products = defaultdict(list)
    for item in items:
        for name in STRENGTH:
            if item.get_closest_marker(name):
                products[name, item.parent.nodeid, item.originalname].append(item)
    for (name, *_), cases in products.items():
        rows = [{axis: repr(value) for axis, value in case.callspec.params.items()} for case in cases]
        chosen = covering(rows, STRENGTH[name])
        for i in {*range(len(cases))}.difference(chosen):
            cases[i].add_marker("full")


CUDA_ON_CPU = {"cuda-on-cpu": RESIDENT, "cuda-on-cpu-passes": PASSES}
BACKENDS = ["cpu", *CUDA_ON_CPU]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """What computes on the arrays of a test: the CPU backend, or the CUDA backend, its kernels compiled for the CPU.

    CUDA threads run in an order that is every test's own; each library's work goes to a stream of its own, and what is
    not ordered across streams is an error.
    """
    if request.param in CUDA_ON_CPU:
        if reason := unavailable():
            pytest.skip(reason)
        devices = Devices(CUDA_ON_CPU[request.param], shuffled(zlib.crc32(request.node.nodeid.encode())))
        devices.use(monkeypatch)
    forget_backends()
    yield request.param
    forget_backends()
    if request.param in CUDA_ON_CPU:
        devices.ordering.verify()
