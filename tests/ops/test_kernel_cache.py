"""Object files of kernels: kept and found again, never stale or torn, and not missed where none can be kept."""

import ctypes
import subprocess
import sys

import pytest

from cubn.backends.cpu import compile


def build():
    """A kernel that answers at its parameters' address."""
    from cubn.backends.cpu.simd import put

    def kernel(parameters, worker):
        put(parameters, worker + 42)

    return kernel


def built_before():
    raise AssertionError("the kernel should have been found")


def answer(build):
    """As in a process that has asked for nothing yet."""
    compile._kernels.pop("answer", None)
    found = ctypes.c_int64()
    compile.compiled("answer", build).call(ctypes.addressof(found), 0)
    return found.value


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_a_kernel_is_compiled_once(folder):
    assert answer(build) == 42
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["answer.o"]
    assert answer(built_before) == 42


@pytest.mark.parametrize("content", [bytes(0), bytes(32), bytes(1000)], ids=["empty", "no code", "other code"])
def test_a_torn_file_is_no_file(folder, content):
    assert answer(build) == 42
    (file,) = folder.rglob("*.o")
    file.write_bytes(content)
    assert answer(build) == 42
    assert answer(built_before) == 42


@pytest.mark.parametrize("place", ["", __file__, "/proc/nowhere"], ids=["off", "a file", "not to be made"])
def test_without_a_folder_every_kernel_is_compiled(place, monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", place)
    assert answer(build) == 42
    with pytest.raises(AssertionError, match="should have been found"):
        answer(built_before)


def test_a_process_that_finds_its_kernels_imports_no_numba(folder):
    program = (
        "import sys, numpy, cubn; cubn.update(cubn.BatchNormState(3), cubn.moments(numpy.ones((4, 3)))); "
        "print('cubn.backends.cpu.language' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
        for _ in range(2)
    ]
    assert [run.stdout.strip() for run in runs] == ["True", "False"]
