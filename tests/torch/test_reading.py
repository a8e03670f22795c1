"""Tensors read natively: what the key distinguishes, where the memory is, and what is left to others."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from cubn.torch._passes import reading as _reading  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64)


@st.composite
def tensors(draw):
    """Of few shapes, strides, types and remainders of the address, so that two of them are often alike."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    whole = torch.zeros([*(2 * n for n in shape), 2], dtype=draw(st.sampled_from(DTYPES)))
    found = whole[..., draw(st.integers(0, 1))]
    for axis, n in enumerate(shape):
        found = found.narrow(axis, 0, n) if draw(st.booleans()) else found.unfold(axis, 1, 2).squeeze(-1)
    if draw(st.booleans()):
        found = found.contiguous()
    return found.permute(draw(st.permutations(range(len(shape)))))


@settings(max_examples=200, deadline=None)
@given(tensors(), tensors())
def test_two_tensors_have_one_key_only_if_all_that_a_call_depends_on_is_equal(a, b):
    def facts(t):
        return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16

    (key_a, at_a), (key_b, at_b) = _reading.read(a), _reading.read(b)
    assert (at_a, at_b) == (a.data_ptr(), b.data_ptr())
    assert (key_a == key_b) == (facts(a) == facts(b))


def test_what_is_absent_has_a_place_in_the_key():
    x, w = torch.zeros(4, 3), torch.zeros(3)
    assert _reading.read(x, None, w)[1:] == (x.data_ptr(), 0, w.data_ptr())
    assert len({_reading.read(*given)[0] for given in ((x, None, w), (x, w, None), (x, w), (x, w, w))}) == 4


def test_that_a_gradient_is_required_makes_no_difference():
    x = torch.zeros(4, 3)
    assert _reading.read(x) == _reading.read(x.detach().requires_grad_())


def test_what_holds_no_numbers_of_its_own_is_left_to_the_full_way():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    freed = torch.zeros(3)
    freed.untyped_storage().resize_(0)
    with torch.sparse.check_sparse_tensor_invariants():
        sparse = torch.zeros(2, 2).to_sparse()
    x = torch.zeros(3)
    for other in (freed, fake, sparse, torch.zeros(3, device="meta"), torch.zeros((1,) * 9), torch.zeros(0), 3, "x"):
        assert _reading.read(x, other) is None
    assert _reading.read(*[x] * 11) is None
    assert _reading.read(*[x] * 10) is not None


def test_reading_keeps_nothing():
    x = torch.zeros(4, 3)
    before = sys.getrefcount(x), sys.getrefcount(None), sys.getrefcount(x.shape)
    for _ in range(1000):
        _reading.read(x, None)
        _reading.read(x, 3)
    assert sys.getrefcount(x) == before[0]
    assert abs(sys.getrefcount(None) - before[1]) < 100


def test_without_the_interface_of_torch_attributes_say_the_same(monkeypatch):
    if hasattr(torch._C, "_dlpack_exchange_api"):
        assert _reading._reader() is not _reading._read_each
        monkeypatch.delattr(torch._C, "_dlpack_exchange_api")
    assert _reading._reader.__wrapped__() is _reading._read_each
    import cubn

    x, w = torch.zeros(4, 3, requires_grad=True), torch.zeros(3)
    cubn.moments(x.detach())  # has met a tensor
    key, *at = _reading._read_each(x, None, w)
    assert at == [x.data_ptr(), 0, w.data_ptr()]
    assert key == _reading._read_each(torch.zeros(4, 3), None, torch.zeros(3))[0]
    assert _reading._read_each(torch.zeros(3, device="meta")) is None
