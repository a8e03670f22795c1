"""Kernels compiled, kept and loaded: once, at once, from files that are never stale; errors name a remedy.

NVIDIA's compiler and driver are stand-ins, but where a test says so.
"""

import importlib.util
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cubn.backends import folder, kernel_files
from cubn.backends.cuda import compile, loading, machine_code, source
from cubn.backends.cuda.compile import compiler
from cubn.backends.cuda.machine_code import MachineCode
from cubn.backends.cuda.plan import Limits, channelwise, option
from cubn.errors import BackendUnavailable
from tests.cuda import nvrtc
from tests.cuda.stand_in import Cuda, CUDADriverError, Nvrtc, RealNvrtc

H100 = (9, 0)
KEEP, FROZEN, UPDATE = (channelwise(kernel, 64) for kernel in ("keep", "frozen", "update"))
WRONG = replace(KEEP, options=("-DACC=float\n#error",))


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Those in the cache, which is a new folder."""
    monkeypatch.setenv("CUBN_CACHE_DIR", str(tmp_path))
    for function in (folder._walked, kernel_files.tell):
        function.cache_clear()
    yield lambda: sorted(tmp_path.rglob("*.cubin"))
    folder._walked.cache_clear()


def code(nvrtc=None, capability=H100):
    return MachineCode(compiler(nvrtc or Nvrtc(), capability))


# --- the text -------------------------------------------------------------------------------------------------------


def test_options_are_in_the_text_before_its_first_line():
    text = source.specialised("channelwise", ("-DACC=float", "-DFLAG=a=b"))
    assert text == "#define ACC float\n#define FLAG a=b\n" + source.translation_unit("channelwise")
    assert text.splitlines()[2].startswith("#line 1 ")


def test_the_machine_code_is_that_of_options_on_a_command_line():
    """By NVIDIA's compiler."""
    try:
        real = RealNvrtc()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    options = option(ACC="float")
    ours = code(real).compiled("channelwise", source.specialised("channelwise", options))
    assert code_of(ours) == code_of(nvrtc.cubin(source.translation_unit("channelwise"), options, 90))


def code_of(cubin):
    """The sections of kernels' instructions of an ELF file."""
    table, size, count, names = (
        int.from_bytes(cubin[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62), (62, 64))
    )
    rows = [cubin[table + size * i : table + size * (i + 1)] for i in range(count)]
    content = [cubin[int.from_bytes(r[24:32], "little") :][: int.from_bytes(r[32:40], "little")] for r in rows]
    labels = [content[names][int.from_bytes(r[:4], "little") :].partition(b"\0")[0] for r in rows]
    found = {label: text for label, text in zip(labels, content, strict=True) if label.startswith(b".text.")}
    assert found
    return found


# --- once -----------------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once_in_a_process_and_once_on_a_machine(files):
    compiling, later = Nvrtc(), Nvrtc()
    first = code(compiling)
    assert first.of(KEEP) == first.of(KEEP)
    again = code(later)
    assert again.of(KEEP) == first.of(KEEP)
    assert (compiling.compiled, later.compiled) == (["keep"], [])
    assert (len(first.compiled_here), again.compiled_here) == (1, [])
    assert [file.parent.name for file in files()] == ["cuda-sm_90-nvrtc-13.1"]
    assert not compiling.open


def test_threads_that_need_the_same_kernel_wait_for_the_first_of_them():
    compiling = Nvrtc()
    begun, go_on = threading.Event(), threading.Event()
    compiling.while_compiling = lambda: (begun.set(), go_on.wait(20))
    shared = code(compiling)
    with ThreadPoolExecutor(6) as executor:
        found = [executor.submit(shared.of, KEEP) for _ in range(6)]
        assert begun.wait(20)
        go_on.set()
        assert len({future.result() for future in found}) == 1
    assert compiling.compiled == ["keep"]


def test_who_waits_for_a_thread_that_fails_tries_by_itself():
    compiling = Nvrtc()
    begun, go_on = threading.Event(), threading.Event()
    failures = [KeyboardInterrupt]

    def fail_once():
        begun.set()
        go_on.wait(20)
        if failures:
            raise failures.pop()

    compiling.while_compiling = fail_once
    shared = code(compiling)
    with ThreadPoolExecutor(2) as executor:
        found = [executor.submit(shared.of, KEEP) for _ in range(2)]
        assert begun.wait(20)
        go_on.set()
        errors = [future.exception() for future in found]
    assert sorted(map(type, errors), key=str) == [KeyboardInterrupt, type(None)]
    assert compiling.compiled == ["keep", "keep"] and not compiling.open


# --- at once --------------------------------------------------------------------------------------------------------


def test_kernels_that_are_needed_together_are_compiled_at_the_same_time(monkeypatch):
    monkeypatch.setattr(machine_code, "cores", lambda: 3)
    compiling = Nvrtc()
    meeting = threading.Barrier(3)
    compiling.while_compiling = lambda: meeting.wait(20)  # an error unless three are under way
    shared = code(compiling)
    shared.make_ready([KEEP, FROZEN, UPDATE, KEEP])
    assert sorted(compiling.compiled) == ["frozen", "keep", "update"]
    shared.make_ready([KEEP, FROZEN, UPDATE])
    assert len(compiling.compiled) == len(shared.compiled_here) == 3


def test_an_error_in_one_of_many_is_raised():
    with pytest.raises(BackendUnavailable, match="cannot compile the kernel keep"):
        code().make_ready([FROZEN, WRONG, UPDATE])


# --- files that are never stale -------------------------------------------------------------------------------------


def test_other_text_options_compilers_and_architectures_are_other_files(files, monkeypatch):
    seen = {code().of(KEEP)}
    seen |= {code().of(replace(KEEP, options=("-DACC=double",)))}
    seen |= {code(capability=(8, 0)).of(KEEP)}
    code(Nvrtc(version=(13, 2))).of(KEEP)
    assert len(seen) == 3 and len(files()) == 4
    monkeypatch.setattr(compile, "OPTIONS", ("-std=c++20",))
    seen |= {code().of(KEEP)}
    assert len(seen) == 4 and len(files()) == 5
    text = source.translation_unit("channelwise")
    monkeypatch.setattr(source, "translation_unit", lambda name: text + "// edited\n")
    assert code().of(KEEP) not in seen
    assert len(files()) == 6


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: b"\1" + c[1:], lambda c: b"", lambda c: c + c])
def test_a_file_that_is_not_what_was_written_is_compiled_anew_and_replaced(change, files):
    whole = code().of(KEEP)
    (file,) = files()
    written = file.read_bytes()
    file.write_bytes(change(written))
    compiling = Nvrtc()
    assert code(compiling).of(KEEP) == whole
    assert compiling.compiled == ["keep"] and file.read_bytes() == written


def test_a_file_in_the_place_of_another_is_not_taken(files):
    codes = [code().of(launch) for launch in (KEEP, FROZEN)]
    first, second = files()
    first.write_bytes(second.read_bytes())
    assert [code().of(launch) for launch in (KEEP, FROZEN)] == codes


def test_files_that_others_can_write_are_not_taken(files, caplog):
    code().of(KEEP)
    files()[0].chmod(0o666)
    compiling = Nvrtc()
    code(compiling).of(KEEP)
    assert compiling.compiled == ["keep"]
    assert "can be written by other users" in caplog.text


@pytest.mark.parametrize("place", ["", "relative"])
def test_without_a_cache_all_works(place, monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", place)
    assert code().of(KEEP) == code().of(KEEP)


# --- errors that name a remedy --------------------------------------------------------------------------------------

REMEDY = "pip install .*nvidia-cuda-nvrtc"


def unavailable(text):
    return pytest.raises(BackendUnavailable, match=f"(?s){re.escape(text)}.*{REMEDY}")


def test_a_missing_compiler():
    missing = Nvrtc()

    def get_version():
        raise RuntimeError('Failure finding "libnvrtc.so.13"\nNo such file')

    missing.getVersion = get_version
    with unavailable('CuPy cannot load (Failure finding "libnvrtc.so.13")'):
        code(missing)


def test_a_compiler_that_is_too_old():
    with unavailable("NVRTC 11.8 is too old; 12.0 is needed"):
        code(Nvrtc(version=(11, 8)))


def test_an_architecture_that_the_compiler_does_not_know():
    with unavailable("NVRTC 13.1 makes no code for compute capability 12.0, only for 7.5, 9.0."):
        code(Nvrtc(architectures=(90, 75)), (12, 0))


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 6), 86), ((8, 9), 80), ((10, 3), 100), ((12, 1), 120), ((9, 0), 90)]
)
def test_a_newer_device_of_a_generation_runs_the_code_of_its_first(capability, architecture):
    """No other's: 8.7 and 10.1 are devices whose code runs on no other."""
    compiling = Nvrtc(architectures=(75, 80, 86, 87, 90, 100, 101, 120))
    assert code(compiling, capability).compiler.options[-1] == f"-arch=sm_{architecture}"


def test_a_kernel_that_does_not_compile(files):
    compiling = Nvrtc()
    with unavailable("NVRTC 13.1 cannot compile the kernel keep for sm_90 (keep.cu(1): error: #error directive)"):
        code(compiling).of(WRONG)
    assert not compiling.open and not files()


def test_a_kernel_that_nvidia_s_compiler_refuses_is_reported_where_it_is(monkeypatch):
    try:
        real = RealNvrtc()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with unavailable('(tile.cuh(3): error: identifier "undefined" is undefined)'):
        code(real).compiled("f", '#line 3 "tile.cuh"\nextern "C" __global__ void f(int* x) { *x = undefined; }')


# --- loading --------------------------------------------------------------------------------------------------------


def loaded(cuda, code, shared_bytes):
    return loading.function(cuda, code, code.of(KEEP), "keep", shared_bytes)


def test_a_kernel_is_loaded_and_may_use_all_shared_memory_but_its_own():
    cuda, shared = Cuda(), code()
    function = loaded(cuda, shared, 100 << 10)
    assert (function.name, cuda.loaded) == ("keep", [shared.of(KEEP)])
    assert cuda.attributes == {(7, 8): (100 << 10) - 512}


def test_a_device_without_more_shared_memory_is_told_nothing():
    cuda = Cuda()
    loaded(cuda, code(), 48 << 10)
    assert cuda.loaded and not cuda.attributes


@pytest.mark.parametrize(
    "said",
    [
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled with an unsupported toolchain.",
        "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device",
        "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid",
    ],
)
def test_a_driver_that_does_not_know_the_code(said):
    with unavailable(f"the CUDA driver does not know what NVRTC 13.1 makes for sm_90 ({said}). Update NVIDIA's driver"):
        loaded(Cuda(said), code(), 0)


def test_another_error_of_the_driver_is_the_driver_s():
    with pytest.raises(CUDADriverError, match="out of memory"):
        loaded(Cuda("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), code(), 0)


def test_limits_by_default_have_clusters_only_where_the_capability_has():
    assert Limits(132, 0, (9, 0)).clusters == (1, 2, 4, 8)
    assert Limits(108, 0, (8, 9)).clusters == (1,)
    assert Limits(132, 0, (9, 0), cluster=4).clusters == (1, 2, 4)


# --- CuPy itself ----------------------------------------------------------------------------------------------------

BY_CUPY = """
import cupy
from cubn.backends.cuda.compile import compiler
from cubn.backends.cuda.machine_code import MachineCode
from cubn.backends.cuda.plan import channelwise

code = MachineCode(compiler(cupy.cuda.nvrtc, (9, 0)))
print(code.of(channelwise("keep", 64))[:4], len(code.compiled_here))
assert {"load", "get_function"} <= {*dir(cupy.cuda.function.Module)}
assert {"CUDADriverError", "funcGetAttribute", "funcSetAttribute"} <= {*dir(cupy.cuda.driver)}
"""


@pytest.mark.skipif(not importlib.util.find_spec("cupy"), reason="needs CuPy")
def test_cupy_has_what_the_stand_in_has():
    done = subprocess.run([sys.executable, "-c", BY_CUPY], capture_output=True, text=True, timeout=120)
    assert done.stdout == "b'\\x7fELF' 1\n", done.stderr
