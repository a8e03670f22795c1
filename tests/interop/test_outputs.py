"""Outputs come from the caller's library, in the caller's layout, in the memory that was written."""

import gc
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from cubn import _arrays
from tests.interop import libraries
from tests.ops import arrays


def described(x):
    return _arrays.describe(x, "x")


def written(output, values):
    """The library's array, once the memory is written."""
    libraries.memory(output.array)[...] = values
    return output.finish()


def own_strides(shape):
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


@pytest.mark.parametrize(("library", "dtype", "layout"), libraries.CASES)
def test_an_output_beside_x(library, dtype, layout):
    store, _ = arrays.lay_out(arrays.normal(np.random.default_rng(2), (3, 4, 5, 2), dtype), layout)
    x = libraries.carry(store, library)
    output = _arrays.empty_like(described(x))
    assert output.array.writable
    y = written(output, store)
    assert type(y) is type(x) and y.dtype == x.dtype
    again = described(y)
    assert again.pointer == output.array.pointer, "no copy"
    assert again.dtype == dtype and again.library is described(x).library
    dense = library == "jax" or arrays.is_dense(store)
    assert again.strides == (described(x).strides if dense else own_strides(store.shape))
    np.testing.assert_array_equal(libraries.memory(again), store)


@pytest.mark.parametrize("library", libraries.LIBRARIES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0, 2), (1, 1), (1, 3, 1)])
def test_outputs_of_none_and_one(library, shape):
    x = libraries.carry(np.ones(shape, np.float32), library)
    y = written(_arrays.empty_like(described(x)), 7)
    assert tuple(y.shape) == shape
    assert (libraries.memory(described(y)) == 7).all()


@pytest.mark.parametrize("library", libraries.LIBRARIES)
@pytest.mark.parametrize("part", [np.s_[:0], np.s_[:, :, :0], np.s_[:, :, :, 2:]])
def test_an_empty_output_has_the_layout_of_x(library, part):
    store = arrays.in_memory(np.ones((3, 4, 5, 2), np.float32), "channels_last", 1)
    x = libraries.carry(store[part], library)
    array = described(x)
    output = _arrays.empty_like(array)
    y = output.finish()
    assert type(y) is type(x) and tuple(y.shape) == tuple(x.shape)
    assert described(y).strides == output.array.strides
    if not array.shape[0]:
        assert output.array.strides == array.strides


def test_where_the_layout_is_ambiguous_outputs_follow_the_strides():
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 1, 3, 4).to(memory_format=torch.channels_last)
    assert x.stride() == (12, 1, 4, 1)
    assert _arrays.empty_like(described(x)).finish().stride() == (12, 1, 4, 1)
    x = np.ones((2, 4, 1, 1), np.float32).transpose(0, 2, 3, 1)
    assert _arrays.empty_like(described(x)).finish().strides == x.strides


def test_a_permuted_jax_array_keeps_its_layout():
    jax = pytest.importorskip("jax")
    whole = np.empty(60 + 16, np.float32)
    start = -whole.ctypes.data % 64 // 4
    store = whole[start : start + 60].reshape(3, 5, 4).transpose(0, 2, 1)
    store[...] = np.arange(60).reshape(3, 4, 5)
    x = jax.dlpack.from_dlpack(store)
    assert described(x).strides == (20, 1, 4)
    y = written(_arrays.empty_like(described(x)), store)
    assert described(y).strides == (20, 1, 4)
    np.testing.assert_array_equal(y, store)


@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_vectors_of_another_dtype(library):
    x = described(libraries.carry(np.ones((2, 3), np.float32), library))
    y = written(_arrays.empty_vector(3, "float64", x), [1, 2, 3])
    assert type(y) is type(x.owner)
    assert described(y).dtype == "float64"
    np.testing.assert_array_equal(libraries.memory(described(y)), [1.0, 2.0, 3.0])


def test_bfloat16_vectors_in_torch_and_jax():
    for library in ("torch", "jax"):
        x = described(libraries.carry(np.ones((2, 3), np.float32), library))
        y = written(_arrays.empty_vector(3, "bfloat16", x), np.array([0x3F80, 0, 0x4000], np.uint16))
        assert [float(v) for v in y] == [1, 0, 2]


def test_float64_from_jax_without_x64():
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        x = described(jax.numpy.ones((2, 3), "float64"))
    with jax.enable_x64(False):
        y = written(_arrays.empty_like(x), 1 / 3)
    assert y.dtype == "float64" and (np.asarray(y) == 1 / 3).all()


@pytest.mark.parametrize("library", libraries.LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_become_arrays_of_the_library(library, dtype):
    beside = described(libraries.carry(np.ones((2, 3), np.float32), library))
    values = np.array([1.5, 2.5], dtype)
    y = beside.library.from_numpy(values, dtype, beside)
    assert type(y) is (type(beside.owner) if library in libraries.KNOWN else np.ndarray)
    array = described(y)
    assert array.dtype == dtype
    values[...] = 0
    np.testing.assert_array_equal(libraries.memory(array), [1.5, 2.5])


@pytest.mark.parametrize("library", libraries.KNOWN)
def test_values_become_bfloat16(library):
    beside = described(libraries.carry(np.ones((2, 3), np.float32), library))
    y = beside.library.from_numpy(np.array([1.5, -2, 0], np.float32), "bfloat16", beside)
    assert libraries.memory(described(y)).tolist() == [0x3FC0, 0xC000, 0]


@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_the_array_keeps_its_memory(library):
    output = _arrays.empty_like(described(libraries.carry(np.ones((64, 33), np.float32), library)))
    y = written(output, 3)
    del output
    gc.collect()
    for _ in range(10):
        np.full((64, 33), np.nan, np.float32)
    assert (libraries.memory(described(y)) == 3).all()


@pytest.mark.parametrize("library", ["jax", "array_api_strict", "tvm_ffi"])
def test_no_output_leaks(library):
    x = described(libraries.carry(np.ones((100, 10), np.float32), library))

    def make(times):
        for _ in range(times):
            _arrays.empty_like(x).finish()
        gc.collect()

    tracemalloc.start()
    try:
        make(100)
        before, _ = tracemalloc.get_traced_memory()
        make(3000)  # 12 MB in all
        after, _ = tracemalloc.get_traced_memory()
        kept = _arrays.empty_like(x).finish()
        with_one, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000
    assert with_one - after >= 4000, "the measurement sees the memory of one output"
    del kept


def test_the_callers_own_destination():
    out = np.zeros((2, 3), np.float32)
    output = _arrays.destination(out)
    libraries.memory(output.array)[...] = 5
    assert output.finish() is out and (out == 5).all()


def test_torch_hears_of_a_written_destination():
    torch = pytest.importorskip("torch")
    out = torch.zeros(2, 3)
    before = out._version
    output = _arrays.destination(out)
    assert out._version == before
    assert output.finish() is out
    assert out._version > before


def run(program, **environment):
    """The program's standard output, in an interpreter of its own; an error if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_outputs_lie_on_the_jax_device_of_x():
    pytest.importorskip("jax")
    program = """
import os, jax, numpy as np
from cubn import _arrays
x = jax.device_put(np.ones((2, 3), "float32"), jax.devices()[2])
array = _arrays.describe(x, "x")
assert array.device == (1, 0)
output = _arrays.empty_like(array)
output.array.owner[...] = 4
y = output.finish()
assert y.device == x.device and (np.asarray(y) == 4).all()
print("done", flush=True)
os._exit(0)  # with several host devices XLA's own threads now and then abort an orderly exit
"""
    assert run(program, XLA_FLAGS="--xla_force_host_platform_device_count=4") == "done"


@pytest.mark.parametrize("library", ["jax", "tvm_ffi"])
def test_outputs_may_outlive_the_interpreter(library):
    pytest.importorskip(library)
    program = f"""
import builtins, numpy as np, {library}
from cubn import _arrays
from tests.interop import libraries
x = _arrays.describe(libraries.carry(np.ones((2, 3), "float32"), "{library}"), "x")
builtins.kept = [_arrays.empty_like(x).finish() for _ in range(3)], x
print("done")
"""
    assert run(program, PYTHONPATH=os.pathsep.join(sys.path)) == "done"
