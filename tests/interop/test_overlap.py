"""Which destinations share memory with an input, and which may be written at all."""

import re

import numpy as np
import pytest

from cubn import _arrays
from cubn.errors import reporting_as


def overlap(a, b):
    a, b = (_arrays.describe(v, "x") for v in (a, b))
    assert _arrays.overlap(a, b) == _arrays.overlap(b, a)
    return _arrays.overlap(a, b)


def test_memory_apart_is_no_overlap():
    memory = np.zeros(100, np.float32)
    assert overlap(memory[:50], memory[50:]) == "none"
    assert overlap(memory[:50], memory[49::-1][:0]) == "none"
    assert overlap(memory[::2], memory[1::2]) == "none"


def test_interleaved_channels_of_one_buffer_are_apart():
    memory = np.zeros((4, 6, 5, 5), np.float32)
    assert overlap(memory[:, :3], memory[:, 3:]) == "none"
    assert overlap(memory[:, :4], memory[:, 3:]) == "partial"


def test_the_same_elements_are_told_from_an_overlap_in_part():
    memory = np.zeros((4, 5), np.float32)
    assert overlap(memory, memory) == "same"
    assert overlap(memory, memory[:]) == "same"
    assert overlap(memory[::2], memory[::2]) == "same"
    assert overlap(memory[:1], np.lib.stride_tricks.as_strided(memory, (1, 5), (400, 4))) == "same"


def test_an_overlap_in_part_is_seen():
    memory = np.zeros(100, np.float32)
    assert overlap(memory[:50], memory[49:99]) == "partial"
    assert overlap(memory, memory[::-1]) == "partial"
    square = memory.reshape(10, 10)
    assert overlap(square, square.T) == "partial"
    assert overlap(memory[:50], memory.view(np.float64)[:50]) == "partial"
    assert overlap(memory[:50], memory[:50].view(np.float16)[:50]) == "partial"


def test_overlap_is_seen_across_libraries():
    torch = pytest.importorskip("torch")
    memory = np.zeros((4, 5), np.float32)
    tensor = torch.from_numpy(memory)
    assert overlap(memory, tensor) == "same"
    assert overlap(memory, tensor[1:]) == "partial"


def refused(array, error, text, function="forward", argument="out"):
    with pytest.raises(error, match=f"^{re.escape(text)}$"), reporting_as(function):
        _arrays.destination(array, argument)


def test_a_read_only_destination():
    out = np.zeros((2, 3), np.float32)
    out.flags.writeable = False
    refused(
        out,
        ValueError,
        "forward: out must be writable; got a read-only array (shape=(2, 3), dtype=float32, device=cpu). Pass a copy.",
    )


def test_a_destination_of_an_immutable_library():
    jax = pytest.importorskip("jax")
    out = jax.numpy.zeros((2, 3), "float32")
    refused(
        out,
        TypeError,
        "forward: out must be an array that can be written; got an immutable jax array "
        "(shape=(2, 3), dtype=float32, device=cpu). Leave it out.",
    )
    assert not np.asarray(out).any()


def test_a_destination_whose_elements_share_memory():
    torch = pytest.importorskip("torch")
    refused(
        torch.zeros(3).expand(2, 3),
        ValueError,
        "backward: dx must have memory of its own for every element; got elements that share memory, strides=(0, 1) "
        "(shape=(2, 3), dtype=float32, device=cpu). Pass a copy.",
        "backward",
        "dx",
    )


def test_a_lazily_negated_destination():
    torch = pytest.importorskip("torch")
    refused(
        torch.ones(2, 3, dtype=torch.complex64).conj().imag,
        ValueError,
        "forward: out must be writable; got a read-only array (shape=(2, 3), dtype=float32, device=cpu). Pass a copy.",
    )
