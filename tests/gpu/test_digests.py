"""The digests that devices are held to: what the backends give here, and whether they see every kernel."""

import numpy as np
import pytest

import cubn.backends.cuda.source
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Limits
from tests.backends import forget_backends
from tests.cuda.specialisations import Recorder
from tests.gpu import digests
from tests.gpu.digests import CASES, LARGE, SMALL, Case
from tests.ops import arrays

FEW = [
    Case("resident, grouped", "bfloat16", "channels_last"),
    Case("resident, wild", "float32", "dense"),
    Case("resident", "float16", "dense"),
    Case("resident, 2-d", "float16", "sliced"),
]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_file_holds_what_the_backends_give(case, backend):
    """The CPU backend, and the CUDA kernels on the CPU."""
    assert digests.on_cpu(case) == digests.expected(case)


@pytest.mark.parametrize("layout", digests.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_layouts_share_a_digest(dtype, layout):
    case = Case("resident, channels", dtype, layout)
    assert digests.on_cpu(case) == digests.expected(case)


def test_every_case_has_its_digests():
    assert all(len(set(digests.expected(case).values())) > 40 for case in SMALL)
    assert all(len(set(digests.expected(case).values())) == 9 for case in LARGE)


@pytest.mark.full
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_file_holds_what_the_cpu_gives_for_large_arrays(case):
    assert digests.on_cpu(case) == digests.expected(case)


def test_values_are_those_of_every_version_of_numpy():
    x = digests.values((2, 3), "float64", 1)
    assert [value.hex() for value in x.ravel().tolist()] == [
        "0x1.980c67f3980c6p-1",
        "0x1.2af2d50d2af2dp+0",
        "0x1.1c90e36f1c90ep+0",
        "0x1.0806f7f908070p+0",
        "0x1.0a62f59d0a630p-1",
        "0x1.d56a2a95d56a2p-2",
    ]
    assert digests.digest(x) == "49fe2a47f2e42b88"


def test_a_digest_sees_a_value_its_dtype_and_its_place():
    x = digests.values((2, 3), "float32", 1)
    moved = x[::-1].copy()
    ulp = x.copy()
    ulp[1, 2] = np.nextafter(ulp[1, 2], np.float32(9))
    different = [x, moved, ulp, x.reshape(3, 2), x.astype(np.float64), np.where(x > 1, np.float32(np.nan), x)]
    assert len({digests.digest(a) for a in different}) == len(different)


def test_all_nan_are_one_and_so_are_zeros():
    bits = np.array([0x7FC00000, 0xFFC00001, 0x80000000], np.uint32)
    assert digests.digest(bits.view(np.float32)) == digests.digest(np.array([np.nan, np.nan, 0], np.float32))
    assert digests.digest(np.array([0xFFFF, 0x8000], np.uint16)) == digests.digest(np.array([0x7FC0, 0], np.uint16))


class Planned(Recorder):
    """With what else the operations ask of a device; no kernel runs, so no result means anything."""

    index = 0

    def from_host(self, values):
        return np.array(values)

    def to_host(self, array, out=None):
        return np.ones(array.shape, array.dtype)

    def staging(self, shape, dtype):
        return np.ones(shape, dtype)

    def beside(self, tables):
        return self.empty((len(tables[0]), sum(table.shape[1] for table in tables)), tables[0].dtype)


def test_the_cases_reach_every_kernel(monkeypatch):
    """As planned for an H100, in one dtype: none has kernels of its own. Plans ask for no values."""
    monkeypatch.setattr(digests, "values", lambda shape, dtype, seed: np.zeros(shape, arrays.STORES[dtype]))
    device = Planned(Limits(132, 227 << 10, (9, 0), 50 << 20))
    monkeypatch.setattr("cubn.backends.cpu.backend", lambda: CudaBackend(device))
    forget_backends()
    for case in (case for case in CASES if case.dtype == "bfloat16"):
        digests.results(case, lambda store: arrays.carry(store, "numpy"))
    forget_backends()
    files = {path.stem for path in cubn.backends.cuda.source.folder().glob("*.cu")}
    assert {launch.source for launch in device.launched} == files
    assert any(launch.cluster > 1 for launch in device.launched)
