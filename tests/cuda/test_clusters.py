"""Clusters of blocks: no larger than the driver says that the device holds, and with the bits of all others."""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cubn.backends.cuda import clusters, loading
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.clusters import largest
from cubn.backends.cuda.compile import compiler
from cubn.backends.cuda.machine_code import MachineCode
from cubn.backends.cuda.plan import THREADS
from tests.cuda import calls
from tests.cuda.named import NAMED
from tests.cuda.specialisations import LIMITS, SHAPES, Extents, Layout, Recorder, run_everything
from tests.cuda.stand_in import Cuda, Nvrtc
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice

SHARED_BYTES = 227 << 10
FUNCTION = 0x7F0123456789


class Driver:
    """Answers as libcuda does, called as C is; how many clusters there are, by their size, or an error."""

    def __init__(self, held, status=lambda size: 0):
        self.asked = []

        def answer(number, function, config):
            words = (ctypes.c_uint * 14).from_address(config)  # CUlaunchConfig, of 56 bytes
            (attribute,) = (ctypes.c_void_p * 1).from_address(config + 40)
            identity, _, *dimensions = (ctypes.c_uint * 5).from_address(attribute)
            self.asked.append((function, words[:7], words[12], identity, dimensions))
            number[0] = held(words[0])
            return status(words[0])

        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_void_p, ctypes.c_void_p)
        self.cuOccupancyMaxActiveClusters = kind(answer)


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_the_largest_cluster_is_the_largest_that_the_device_holds(most, caplog):
    assert largest(FUNCTION, SHARED_BYTES, Driver(lambda size: size <= most)) == most
    assert not caplog.records


def test_the_driver_is_asked_of_the_largest_blocks_there_are():
    driver = Driver(lambda size: 1)
    assert largest(FUNCTION, SHARED_BYTES, driver) == 8
    assert driver.asked == [
        (FUNCTION, [size, 1, 1, 2 * THREADS, 1, 1, SHARED_BYTES], 1, 4, [size, 1, 1]) for size in (2, 4, 8)
    ]
    blocks = max(launch.threads for launch in launches(LIMITS[2]))
    assert blocks <= clusters.MOST_THREADS


def launches(limits):
    recorder = Recorder(limits)
    for extents in SHAPES.values():
        for layout in ("nchw", "nhwc"):
            run_everything(CudaBackend(recorder), Extents(*extents), Layout(layout), "bfloat16")
    return recorder.launched


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (SimpleNamespace(), "cuOccupancyMaxActiveClusters"),
        (Driver(lambda size: 1, lambda size: 801 if size == 8 else 0), "CUDA error 801"),
    ],
)
def test_a_driver_that_does_not_tell_means_no_clusters(driver, said, caplog):
    assert largest(FUNCTION, SHARED_BYTES, driver) == 1
    assert said in caplog.text and "no clusters of blocks" in caplog.text
    kept = [argument for record in caplog.records for argument in record.args]
    assert not any(isinstance(argument, BaseException) for argument in kept), "whose frames keep arrays alive"


def test_without_a_driver_s_library_there_are_no_clusters(monkeypatch, caplog):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert loading.largest_cluster(Cuda(), MachineCode(compiler(Nvrtc(), (9, 0))), SHARED_BYTES) == 1
    assert "libcuda.so.1" in caplog.text


def test_the_probe_may_use_all_shared_memory_when_the_driver_is_asked(monkeypatch):
    cuda, asked = Cuda(), []
    monkeypatch.setattr(clusters, "largest", lambda *arguments: asked.append((arguments, dict(cuda.attributes))) or 4)
    assert loading.largest_cluster(cuda, MachineCode(compiler(Nvrtc(), (9, 0))), SHARED_BYTES) == 4
    assert asked == [((7, SHARED_BYTES), {(7, 8): SHARED_BYTES - 512})]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_structures_are_as_large_as_the_driver_s(tmp_path):
    """As cuda.h declares them."""
    program = """
    #include <cstdio>
    struct Attribute { unsigned id; char padding[8 - sizeof(unsigned)]; union { char rest[64]; void* pointer; }; };
    struct Config { unsigned grid[3], block[3], shared; void* stream; Attribute* attributes; unsigned number; };
    int main() { std::printf("%zu %zu", sizeof(Attribute), sizeof(Config)); }"""
    target = str(tmp_path / "sizes")
    subprocess.run(["g++", "-x", "c++", "-", "-o", target], input=program, text=True, check=True)
    found = subprocess.run([target], capture_output=True, text=True, check=True).stdout.split()
    assert found == [str(ctypes.sizeof(kind)) for kind in (clusters._Attribute, clusters._Config)]


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize("limits", [some for some in LIMITS if some.shared_bytes and some.clusters[1:]], ids=str)
def test_no_plan_has_a_larger_cluster_than_the_device_holds(limits, most):
    found = {launch.cluster for launch in launches(replace(limits, cluster=most))}
    assert max(found) == most


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in NAMED if name.endswith(("a cluster", "most of a multiprocessor"))])
def test_a_layer_has_the_same_bits_in_smaller_clusters(name, most):
    layer, limits = NAMED[name]
    device = CpuDevice(replace(limits, cluster=most))
    calls.check(CudaBackend(device), layer)
    assert max(launch.cluster for launch in device.launched) <= most
