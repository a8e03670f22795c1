"""Exporters that are wrong, odd or hostile: what a capsule says is checked before any of it is believed."""

import gc
import re

import numpy as np
import pytest

import cubn
from cubn import _arrays
from tests.interop import exporter, libraries
from tests.interop.exporter import BOOL, CPU, CUDA, Exporter

NULL = None
EDGE = 1 << 63


def described(x):
    return _arrays.describe(x, "x")


def refused(x, error, text, cause=None):
    for operation in (lambda: described(x), lambda: cubn.moments(x), lambda: cubn.forward(x, cubn.BatchNormState(3))):
        with pytest.raises(error, match=r"^\w+: x must " + re.escape(text)) as caught:
            operation()
        assert cause is None or caught.value.__cause__ is cause


# --- the producer itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, (1, 0), (1, 3)])
def test_a_sound_capsule_is_read_as_it_is(version):
    x = Exporter(version=version, shape=(3, 2), strides=(1, 3), byte_offset=0)
    array = described(x)
    np.testing.assert_array_equal(libraries.memory(array), [[0, 3], [1, 4], [2, 5]])
    assert array.writable == (version is not None)
    np.testing.assert_array_equal(cubn.moments(x).mean, [1, 4])


@pytest.mark.parametrize("flags", [1, 2, 3])
def test_flags_that_forbid_writing(flags):
    assert not described(Exporter(flags=flags)).writable


def test_capsules_and_their_memory_are_let_go():
    gc.collect()
    before = exporter.alive()
    x = Exporter()
    kept = described(x)
    assert exporter.alive() == before + 1
    del kept
    cubn.moments(x)
    for bad in (Exporter(data=NULL), Exporter(version=(2, 0)), Exporter(shape=(-1, 3)), Exporter(lanes=2)):
        with pytest.raises((BufferError, TypeError)):
            described(bad)
    gc.collect()
    assert exporter.alive() == before


# --- capsules of no array -------------------------------------------------------------------------------------------

MALFORMED = {
    "no memory": ({"data": NULL}, "a NULL data pointer"),
    "no memory, old": ({"data": NULL, "version": None}, "a NULL data pointer"),
    "an offset from no memory": ({"data": NULL, "byte_offset": 64}, "a NULL data pointer"),
    "no shape": ({"shape": NULL, "ndim": 2}, "a NULL shape"),
    "negative axes": ({"ndim": -1}, "-1 axes"),
    "too many axes": ({"ndim": 65}, "65 axes"),
    "axes without end": ({"ndim": 2**31 - 1}, "2147483647 axes"),
    "a negative extent": ({"shape": (-3, 2)}, "shape (-3, 2)"),
    "a negative extent beside none": ({"shape": (-3, 0)}, "shape (-3, 0)"),
    "two negative extents": ({"shape": (-3, -2), "strides": NULL}, "shape (-3, -2)"),
    "more elements than memory": ({"shape": (1 << 31, 1 << 31), "strides": (0, 0)}, "shape (2147483648, 2147483648)"),
    "extents whose product overflows": ({"shape": (1 << 62, 4), "strides": (0, 0)}, f"shape ({1 << 62}, 4)"),
    "huge extents beside none": ({"shape": (0, 1 << 62), "strides": NULL}, f"shape (0, {1 << 62})"),
    "a stride that overflows in bytes": ({"shape": (1, 3), "strides": (1 << 62, 1)}, f"strides ({1 << 62}, 1)"),
    "the most negative stride": ({"shape": (1, 3), "strides": (-EDGE, 1)}, f"strides ({-EDGE}, 1)"),
    "elements past the end": ({"shape": (9, 3), "strides": (1 << 58, 1)}, "elements beyond the end of memory"),
    "elements before the start": ({"strides": (-(1 << 59), 1)}, "elements beyond the end of memory"),
    "an offset past the end": ({"byte_offset": EDGE}, "elements beyond the end of memory"),
    "an offset that wraps around": ({"byte_offset": 2 * EDGE - 4}, "elements beyond the end of memory"),
    "an offset past the end of nothing": (
        {"shape": (0, 3), "byte_offset": 2 * EDGE - 4},
        "elements beyond the end of memory",
    ),
    "version 0": ({"version": (0, 8)}, "version 0.8, and cubn reads 1"),
    "version 2": ({"version": (2, 0)}, "version 2.0, and cubn reads 1"),
    "a used capsule": ({"is_used": True}, "a used capsule"),
    "a used capsule, old": ({"is_used": True, "version": None}, "a used capsule"),
    "no capsule": ({"returned": "a capsule"}, "a str"),
    "CUDA memory as the CPU's": (
        {"device": (CUDA, 0), "claimed": (CPU, 0)},
        "one of cuda:0 beside a __dlpack_device__ of cpu",
    ),
    "CPU memory as CUDA's": (
        {"device": (CPU, 0), "claimed": (CUDA, 0)},
        "one of cpu beside a __dlpack_device__ of cuda:0",
    ),
    "another CUDA device": (
        {"device": (CUDA, 1), "claimed": (CUDA, 0)},
        "one of cuda:1 beside a __dlpack_device__ of cuda:0",
    ),
    "memory of an unknown kind": (
        {"device": (10, 0), "claimed": (CPU, 0)},
        "one of dlpack-10:0 beside a __dlpack_device__ of cpu",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_capsule(case):
    fields, got = MALFORMED[case]
    refused(Exporter(**fields), BufferError, f"have a valid DLPack capsule; got {got}")


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("shape", "strides", "got"),
    [
        ((1, 3), (1 << 60, 1), f"strides ({1 << 60}, 1)"),
        ((1 << 31, 1 << 29), (0, 0), "shape (2147483648, 536870912)"),
    ],
)
def test_an_array_beyond_what_can_be_counted(library, shape, strides, got):
    store = np.ones(6, np.float16)
    if library == "torch":
        x = pytest.importorskip("torch").from_numpy(store).as_strided(shape, strides)
    else:
        x = np.lib.stride_tricks.as_strided(store, shape, [2 * step for step in strides])
    refused(x, ValueError, f"fit in memory; got {got} (shape={shape}")


@pytest.mark.parametrize(
    ("code", "bits", "lanes", "name"),
    [
        (2, 32, 0, "float32x0"),
        (2, 32, 2, "float32x2"),
        (2, 32, 65535, "float32x65535"),
        (2, 31, 1, "float31"),
        (2, 0, 1, "float0"),
        (2, 255, 1, "float255"),
        (BOOL, 1, 1, "bool1"),
        (0, 32, 1, "int32"),
        (5, 64, 1, "complex64"),
        (255, 32, 1, "dlpack-255-32"),
    ],
)
def test_a_dtype_of_no_array_of_ours(code, bits, lanes, name):
    text = f"have dtype float16, bfloat16, float32 or float64; got {name} (shape=(2, 3), dtype={name}, device=cpu)."
    refused(Exporter(code=code, bits=bits, lanes=lanes), TypeError, text)


def test_a_misaligned_capsule():
    x = Exporter(byte_offset=2)
    text = f"be aligned to its elements; got address {x.memory.ctypes.data + 2:#x}"
    refused(x, ValueError, text)


def test_no_strides_and_no_memory_where_none_is_needed():
    assert described(Exporter(strides=NULL)).strides == (3, 1)
    array = described(Exporter(shape=(0, 3), strides=NULL, data=NULL))
    assert (array.shape, array.strides) == ((0, 3), (3, 1))
    assert cubn.moments(Exporter(shape=(0, 3), data=NULL)).count == 0
    with pytest.raises(ValueError, match=r"^forward: x must have 2 axes or more; got"):
        cubn.forward(Exporter(shape=NULL, strides=NULL), cubn.BatchNormState(3))


def test_the_index_of_a_cpu_is_its_librarys_own_affair():
    for device, claimed in (((CPU, 1), (CPU, 0)), ((CPU, 0), (CPU, 3)), ((CPU, -1), (CPU, 0))):
        assert described(Exporter(device=device, claimed=claimed)).device == (1, 0)


# --- exporters that do not answer -----------------------------------------------------------------------------------


class NoDevice:
    def __dlpack__(self, **options):
        raise AssertionError("no device was told")


class NoStream:
    """Knows neither versions nor streams, and fails in both ways."""

    def __dlpack_device__(self):
        return CUDA, 0

    def __dlpack__(self):
        raise AssertionError("a stream is asked for")


@pytest.mark.parametrize("error", [RuntimeError("no"), TypeError("no"), BufferError("no"), ZeroDivisionError("no")])
def test_whatever_an_exporter_raises(error):
    refused(Exporter(raised=error), BufferError, "be an array its library can export; got 'no'", error)
    refused(Exporter(claimed=error), TypeError, "have a __dlpack_device__ of two integers; got 'no'", error)


def test_an_error_without_a_text():
    refused(Exporter(raised=KeyError()), BufferError, "be an array its library can export; got KeyError")


@pytest.mark.parametrize("claimed", [(), (1,), (1, 0, 0), 1, "cpu", (1.0, 0.0), ("cpu", 0), (None, None)])
def test_a_device_of_the_wrong_form(claimed):
    refused(Exporter(claimed=claimed), TypeError, "have a __dlpack_device__ of two integers; got ")


def test_an_exporter_without_a_device():
    refused(NoDevice(), TypeError, "have a __dlpack_device__ of two integers; got ")
    refused(NoStream(), BufferError, "be an array its library can export; got ")


def test_an_interrupt_is_no_error_of_the_exporter():
    with pytest.raises(KeyboardInterrupt):
        described(Exporter(raised=KeyboardInterrupt()))


def test_a_namespace_that_cannot_be_had():
    class Nowhere(Exporter):
        def __array_namespace__(self):
            raise RuntimeError("no")

    assert cubn.moments(Nowhere()).count == 2
