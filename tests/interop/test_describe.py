"""Any library's array is described as it lies in memory, without a copy, and stays alive."""

import gc
import weakref

import numpy as np
import pytest

from cubn import _arrays
from tests.interop import libraries
from tests.ops import arrays


def described(x, dtypes=_arrays.FLOATS, **options):
    return _arrays.describe(x, "x", dtypes, **options)


def made(library, dtype="float32", layout="nchw", shape=(3, 4, 5, 2)):
    store, _ = arrays.lay_out(arrays.normal(np.random.default_rng(1), shape, dtype), layout)
    return store, libraries.carry(store, library)


@pytest.mark.parametrize(("library", "dtype", "layout"), libraries.CASES)
def test_every_library_dtype_and_layout(library, dtype, layout):
    store, x = made(library, dtype, layout)
    array = described(x)
    assert array.shape == store.shape and array.dtype == dtype and array.device == (1, 0)
    assert array.pointer == libraries.address(x)
    assert array.owner is x
    assert array.library.name == library
    np.testing.assert_array_equal(libraries.memory(array), store)
    if library != "jax":
        assert array.pointer == store.ctypes.data
        assert _steps(array) == [s // store.itemsize for s in arrays.steps(store)]


def _steps(array):
    return [s for s, n in zip(array.strides, array.shape, strict=True) if n > 1]


@pytest.mark.parametrize("library", libraries.LIBRARIES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0, 2), (1, 1), (1, 3, 1)])
def test_extents_of_none_and_one(library, shape):
    store, x = made(library, shape=shape)
    array = described(x)
    assert array.shape == shape
    np.testing.assert_array_equal(libraries.memory(array), store)


@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_masks_and_counters_are_described_as_such(library):
    bits, counts = np.array([[True, False, True]]), np.array([[1, 2, 3]], np.int64)
    mask = described(libraries.carry(bits, library), _arrays.BOOL)
    assert mask.dtype == "bool"
    np.testing.assert_array_equal(libraries.memory(mask), bits)
    if library != "jax":
        assert described(libraries.carry(counts, library), ("int64",)).dtype == "int64"


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict", "tvm_ffi"])
def test_arrays_that_can_be_written(library):
    assert described(made(library)[1]).writable
    assert not described(made(library)[1]).library.immutable


def test_arrays_that_cannot_be_written():
    store, x = made("jax")
    assert not described(x).writable and described(x).library.immutable
    store.flags.writeable = False
    assert not described(store).writable
    assert not described(libraries.carry(store, "array_api_strict")).writable


def test_a_memory_map_is_a_plain_array(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    array = described(mapped)
    assert array.pointer == mapped.ctypes.data and not array.writable


@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_the_description_keeps_the_memory(library):
    store, x = made(library, shape=(64, 33))
    expected = store.copy()
    array = described(x)
    del store, x
    gc.collect()
    for _ in range(10):
        np.full((64, 33), np.nan, np.float32)
    np.testing.assert_array_equal(libraries.memory(array), expected)


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict", "tvm_ffi"])
def test_the_description_lets_the_memory_go(library):
    store, x = made(library)
    whole = store if store.base is None else store.base
    alive = weakref.ref(whole)
    array = described(x)
    del store, x, whole
    assert alive() is not None
    del array
    gc.collect()
    assert alive() is None


def test_a_donated_jax_array_cannot_change_under_a_description():
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(6.0).reshape(2, 3)
    array = described(x)
    double = jax.jit(lambda a: a * 2, donate_argnums=0)(x)
    np.testing.assert_array_equal(libraries.memory(array), np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(double, 2 * np.arange(6.0).reshape(2, 3))


def test_the_description_keeps_the_memory_of_a_deleted_jax_array():
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(100_000.0) + 1
    array = described(x)
    x.delete()
    for _ in range(10):
        (jax.numpy.zeros(100_000) + 1).block_until_ready()
    np.testing.assert_array_equal(libraries.memory(array), np.arange(100_000.0) + 1)


def test_jax_arrays_still_being_computed_are_waited_for():
    jax = pytest.importorskip("jax")
    power = jax.jit(lambda a: jax.lax.fori_loop(0, 60, lambda _, b: jax.numpy.tanh(b @ a), a))
    x = jax.numpy.full((300, 300), 0.01, "float32")
    expected = np.asarray(power(x))
    np.testing.assert_array_equal(libraries.memory(described(power(x))), expected)


def test_torch_parameters_are_read_detached_when_asked():
    torch = pytest.importorskip("torch")
    gamma = torch.nn.Parameter(torch.ones(3))
    array = described(gamma, detach=True)
    assert array.pointer == gamma.data_ptr()
    assert not array.writable


def test_a_lazily_negated_torch_view_has_its_own_sign():
    torch = pytest.importorskip("torch")
    numbers = torch.complex(torch.zeros(2, 3), torch.arange(6.0).reshape(2, 3))
    x = numbers.conj().imag
    assert x.is_neg()
    array = described(x)
    np.testing.assert_array_equal(libraries.memory(array), -np.arange(6.0).reshape(2, 3))
    assert not array.writable


def test_torch_subclasses_with_numbers_of_their_own():
    torch = pytest.importorskip("torch")

    class Image(torch.Tensor):
        pass

    x = torch.ones(2, 3).as_subclass(Image)
    assert described(x).pointer == x.data_ptr()


def test_the_version_of_a_torch_tensor():
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3)
    array = described(x)
    before = array.library.version(array.owner)
    x.add_(1)
    assert array.library.version(array.owner) > before
    before = array.library.version(array.owner)
    array.library.mark_written(array.owner)
    assert array.library.version(array.owner) > before
    with torch.inference_mode():
        array = described(torch.ones(2, 3))
    assert array.library.version(array.owner) is None
    array.library.mark_written(array.owner)


@pytest.mark.parametrize("library", ["numpy", "jax", "array_api_strict"])
def test_other_libraries_count_no_versions(library):
    array = described(made(library)[1])
    assert array.library.version(array) is None


@pytest.mark.parametrize(
    ("library", "dtype"),
    [(lib, dtype) for lib in libraries.LIBRARIES for dtype in arrays.DTYPES if libraries.can_carry(lib, dtype, "nchw")],
)
def test_copies_in_numpy(library, dtype):
    store, x = made(library, dtype, shape=(7, 2))
    array = described(x)
    copy = array.library.to_numpy(array)
    assert copy.dtype == ("float32" if dtype == "bfloat16" else dtype)
    widened = (store.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else store
    np.testing.assert_array_equal(copy, widened)
    copy[...] = 0
    assert libraries.memory(array).any()


def test_no_description_leaks():
    jax = pytest.importorskip("jax")
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def pass_by(times):
        for i in range(times):
            described(jax.numpy.full((512, 1024), float(i), "float32"))

    pass_by(20)
    before = peak()
    pass_by(400)  # 840 MB in all
    assert peak() - before < 200e3 * (1024 if before > 1e8 else 1)  # bytes on macOS, else kB
