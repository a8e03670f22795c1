"""A library nobody has heard of: all it has is `__dlpack__` and `from_dlpack`."""

import re
import types

import numpy as np
import pytest

from cubn import _arrays
from cubn._arrays import dlpack
from cubn.errors import reporting_as
from tests.interop import libraries


class Grid:
    """An array of the unheard-of library, over a NumPy array."""

    def __init__(self, values, namespace=None, **exports):
        self.values = values
        self._exports = exports
        self._namespace = namespace

    def __array_namespace__(self):
        return self._namespace

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)


class Old(Grid):
    """From before DLPack 1: no version, so no flags."""

    def __dlpack__(self, stream=None):
        return self.values.__dlpack__()


class Unready(Grid):
    """Knows of versions, and has none yet."""

    def __dlpack__(self, *, max_version=None):
        if max_version is not None:
            raise NotImplementedError("max_version")
        return self.values.__dlpack__()


class Shy(Grid):
    def __dlpack__(self, **options):
        raise BufferError("not today")


class Wrong(Grid):
    def __dlpack__(self, **options):
        return "a capsule"


@reporting_as("forward")
def described(x):
    return _arrays.describe(x, "x")


def test_into_the_library_and_back():
    namespace = types.SimpleNamespace(from_dlpack=lambda exporter: Grid(np.from_dlpack(exporter), namespace))
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = described(Grid(values, namespace))
    np.testing.assert_array_equal(libraries.memory(array), values)
    output = _arrays.empty_like(array)
    libraries.memory(output.array)[...] = 2 * values
    y = output.finish()
    assert type(y) is Grid
    assert y.values.ctypes.data == output.array.pointer
    np.testing.assert_array_equal(y.values, 2 * values)


def test_a_library_that_copies_on_the_way_in():
    namespace = types.SimpleNamespace(from_dlpack=lambda exporter: Grid(np.from_dlpack(exporter).copy(), namespace))
    output = _arrays.empty_like(described(Grid(np.zeros((2, 3), np.float32), namespace)))
    libraries.memory(output.array)[...] = 7
    assert (output.finish().values == 7).all()


def test_a_library_with_no_way_in():
    class Closed(Grid):
        __array_namespace__ = property()

    text = f"cubn: x's library must have from_dlpack, to make outputs; got {__name__.partition('.')[0]}. Pass out=."
    array = described(Closed(np.zeros((2, 3), np.float32)))
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        _arrays.empty_like(array)
    assert _arrays.destination(Closed(np.zeros((2, 3), np.float32))).array.writable


@pytest.mark.parametrize("kind", [Old, Unready])
def test_an_exporter_without_flags_is_only_read(kind):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = described(kind(values))
    assert array.pointer == values.ctypes.data
    assert not array.writable


def test_a_copy_is_only_read():
    class Copying(Grid):
        def __dlpack__(self, **options):
            return self.values.__dlpack__(**options, copy=True)

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = described(Copying(values))
    assert array.pointer != values.ctypes.data
    assert not array.writable
    np.testing.assert_array_equal(libraries.memory(array), values)


class Edited(Grid):
    """Exports NumPy's capsule with something in it changed."""

    def __init__(self, values, edit):
        super().__init__(values)
        self._edit = edit

    def __dlpack__(self, **options):
        capsule = self.values.__dlpack__(max_version=(1, 0))
        self._edit(dlpack._Versioned.from_address(dlpack._pointer(capsule, b"dltensor_versioned")))
        return capsule


def test_an_offset_counts():
    def edit(capsule):
        capsule.tensor.data -= 8
        capsule.tensor.byte_offset = 8

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert described(Edited(values, edit)).pointer == values.ctypes.data


def test_no_strides_mean_c_order():
    def edit(capsule):
        capsule.tensor.strides = None

    assert described(Edited(np.zeros((2, 3, 4), np.float32), edit)).strides == (12, 4, 1)


def test_a_later_dlpack_is_not_guessed_at():
    def edit(capsule):
        capsule.major = 2

    text = "forward: x must have a valid DLPack capsule; got version 2.0, and cubn reads 1."
    with pytest.raises(BufferError, match=f"^{re.escape(text)}$"):
        described(Edited(np.zeros((2, 3), np.float32), edit))


def test_vector_elements_are_refused():
    def edit(capsule):
        capsule.tensor.dtype.lanes = 4

    text = (
        "forward: x must have dtype float16, bfloat16, float32 or float64; got float32x4 "
        "(shape=(2, 3), dtype=float32x4, device=cpu). Convert it first."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        described(Edited(np.zeros((2, 3), np.float32), edit))


def test_an_exporter_that_refuses():
    text = "forward: x must be an array its library can export; got 'not today'."
    with pytest.raises(BufferError, match=f"^{re.escape(text)}$") as caught:
        described(Shy(np.zeros((2, 3))))
    assert str(caught.value.__cause__) == "not today"


def test_an_exporter_of_something_else():
    text = "forward: x must have a valid DLPack capsule; got a str."
    with pytest.raises(BufferError, match=f"^{re.escape(text)}$"):
        described(Wrong(np.zeros((2, 3))))
