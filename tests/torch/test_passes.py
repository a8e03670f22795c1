"""The short way of the passes: calls with layouts that were met before give what the core gives, and refuse it too."""

import gc
import itertools
import weakref
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import cubn  # noqa: E402
from cubn import _calls  # noqa: E402
from cubn.torch import _passes  # noqa: E402
from cubn.torch._passes.counters import Counters  # noqa: E402
from cubn.torch._passes.known import TRAININGS  # noqa: E402

C = 6
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Given:
    """What a layer has: parameters, running statistics, counters."""

    def __init__(self, seed=0, affine=True, dtype=torch.float32):
        drawn = torch.randn((3, C), generator=torch.Generator().manual_seed(seed), dtype=dtype)
        self.weight, self.bias = (drawn[0], drawn[1]) if affine else (None, None)
        self.mean, self.var = drawn[2].clone(), drawn[2].square() + 0.5
        self.counters = Counters(torch.tensor(0), torch.zeros(C, dtype=torch.int64))

    @property
    def vectors(self):
        return self.weight, self.bias, self.mean, self.var

    def state(self, **options):
        tracked, skipped = self.counters
        return cubn.BatchNormState.from_arrays(
            gamma=self.weight, beta=self.bias, running_mean=self.mean.clone(), running_var=self.var.clone(),
            tracked=int(tracked), skipped=skipped, **options,
        )  # fmt: skip


def drawn(shape, dtype, layout, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3 + 1
    if layout == "last" and len(shape) in FORMATS:
        return x.contiguous(memory_format=FORMATS[len(shape)])
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    return x


def same(a, b):
    return torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


options = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(4, C), (5, C, 3), (3, C, 4, 5), (2, C, 2, 3, 4)]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
        "layout": st.sampled_from(["first", "last", "sliced"]),
        "affine": st.booleans(),
        "masked": st.booleans(),
        "added": st.booleans(),
        "relu": st.booleans(),
        "momentum": st.sampled_from([0.0, 0.1, 1.0, None]),
        "eps": st.sampled_from([1e-5, 0.5]),
    }
)


@settings(max_examples=60, deadline=None)
@given(options)
def test_every_call_has_the_bits_of_the_core_however_often_its_layouts_were_met(of):
    shape, dtype, layout, momentum, eps = of["shape"], of["dtype"], of["layout"], of["momentum"], of["eps"]
    layer = Given(affine=of["affine"])
    for seed in range(3):
        x, dy, r = (drawn(shape, dtype, layout, 10 * seed + i) for i in range(3))
        x[0, 2] = torch.nan if seed == 1 else x[0, 2]
        mask = None
        if of["masked"]:
            mask = torch.rand(shape[:1] + shape[2:], generator=torch.Generator().manual_seed(seed)) > 0.3
            mask[:2] = True
        how = {"mask": mask, "residual": r if of["added"] else None, "relu": of["relu"]}
        state = layer.state(eps=eps, momentum=momentum)
        expected, saved = cubn.forward_train(x, state, **how)
        y, left, bits = _passes.train(x, layer.vectors, layer.counters, momentum=momentum, eps=eps, **how)
        assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7)) and y.stride() == expected.stride()
        assert torch.equal(layer.mean, state.running_mean) and torch.equal(layer.var, state.running_var)
        assert layer.counters.num_batches_tracked == seed + 1
        kept = layer.counters.num_batches_tracked - layer.counters.skipped
        assert kept.tolist() == (state.tracked - state.skipped).tolist()
        gradients, wanted = _passes.backward(dy, x, mask, left, bits), cubn.backward(dy, saved)
        frozen, of_frozen, frozen_bits = _passes.frozen(x, layer.vectors, eps=eps, **how)
        wanted_frozen, saved = cubn.forward_frozen(x, state, **how)
        assert same(frozen.nan_to_num(7), wanted_frozen.nan_to_num(7))
        assert same(_passes.inference(x, layer.vectors, eps=eps, **how).nan_to_num(7), frozen.nan_to_num(7))
        frozen_gradients = _passes.backward(dy, x, mask, of_frozen, frozen_bits)
        for got, want in zip((*gradients, *frozen_gradients), (*wanted, *cubn.backward(dy, saved)), strict=True):
            assert (got is None) == (want is None)
            assert got is None or same(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("layout", ["first", "sliced"])
def test_a_view_of_the_other_sign_is_read_as_torch_reads_it(layout):
    layer, x, dy = Given(), drawn((4, C, 3), torch.float32, layout, 0), drawn((4, C, 3), torch.float32, layout, 1)
    for _ in range(2):
        plain = _passes.train(x, layer.vectors)
        negative = _passes.train(torch._neg_view(-x), layer.vectors)
        assert torch.equal(plain[0], negative[0])
        one, other = (_passes.backward(g, x, None, plain[1], None) for g in (dy, torch._neg_view(-dy)))
        assert torch.equal(one.dx, other.dx)
        given = (x, torch._neg_view(-x))
        one, other = (_passes.backward(dy, t, None, _passes.train(t, layer.vectors)[1], None) for t in given)
        assert torch.equal(one.dx, other.dx)
        added = ({"residual": dy}, {"residual": torch._neg_view(-dy)})
        assert torch.equal(*(_passes.train(x, (*layer.vectors[:2], None, None), **how)[0] for how in added))
        assert torch.equal(*(_passes.frozen(x, layer.vectors, **how)[0] for how in added))
        assert torch.equal(*(_passes.inference(t, layer.vectors) for t in (x, torch._neg_view(-x))))


def test_running_statistics_that_share_memory_are_refused_by_the_second_call_too():
    x, memory = torch.randn(4, C), torch.ones(2 * C)
    apart = Given()
    assert _passes.train(x, apart.vectors) and _passes.train(x, apart.vectors)
    for weight, bias, mean, var in itertools.product((0, C), (0, C), (0, C), (0, C)):
        if len({mean, var} & {weight, bias}) or mean == var:
            vectors = [memory[at : at + C] for at in (weight, bias, mean, var)]
            with pytest.raises(ValueError, match="share no memory"):
                _passes.train(x, vectors)
    assert torch.equal(memory, torch.ones(2 * C))
    half = torch.ones(2 * C)
    with pytest.raises(ValueError, match="share no memory"):
        _passes.train(x, (None, None, half[:C], half[C // 2 : C // 2 + C]))


def test_what_the_first_call_refuses_the_second_refuses():
    x, layer = torch.randn(4, C), Given()
    _passes.train(x, layer.vectors, layer.counters)
    before = [t.clone() for t in (*layer.vectors, *layer.counters)]
    for wrong in ({"eps": 0.0}, {"eps": float("nan")}, {"momentum": 1.5}, {"momentum": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            _passes.train(x, layer.vectors, layer.counters, **wrong)
    masked = torch.tensor([True, True, False, False])
    _passes.train(x, layer.vectors, layer.counters, mask=masked, momentum=0.0)
    with pytest.raises(ValueError, match="more than one value per channel"):
        _passes.train(x, layer.vectors, layer.counters, mask=torch.tensor([True, False, False, False]))
    assert all(map(torch.equal, before[:4], layer.vectors))


def test_statistics_at_eps_0_are_refused_by_the_second_call_too():
    x, layer = torch.randn(4, C), Given()
    for call in (_passes.frozen, _passes.inference):
        assert call(x, layer.vectors) is not None
        for eps in (0.0, -1.0, float("inf")):
            with pytest.raises(ValueError, match="eps"):
                call(x, layer.vectors, eps=eps)


def test_counters_that_kernels_could_not_write_are_refused():
    x, layer = torch.randn(4, C), Given()
    tracked, skipped = layer.counters
    spread = torch.zeros(2 * C, dtype=torch.int64)[::2]
    for _ in range(2):
        for wrong in (
            (tracked, skipped[1:]),
            (tracked, skipped.float()),
            (torch.zeros(2).long(), skipped),
            (tracked, spread),
        ):
            with pytest.raises(ValueError, match=r"num_batches_tracked|skipped"):
                _passes.train(x, layer.vectors, Counters(*wrong))
        _passes.train(x, layer.vectors, layer.counters)
    assert tracked == 2


def test_an_average_that_begins_anew_is_of_the_batches_since():
    layer, x = Given(), torch.randn(3, 4, C)
    _passes.train(x[0], layer.vectors, layer.counters, momentum=None)
    layer.mean[2] = torch.nan
    for i in (1, 2):
        _passes.train(x[i], layer.vectors, layer.counters, momentum=None)
    assert layer.counters.num_batches_tracked == 3
    assert layer.counters.skipped.tolist() == [0, 0, 1, 0, 0, 0]
    torch.testing.assert_close(layer.mean[2], x[1:, :, 2].mean())
    torch.testing.assert_close(layer.mean[3], x[:, :, 3].mean())


def test_what_is_kept_of_a_call_holds_no_tensor():
    layer, x = Given(), torch.randn(7, C)
    y, left, bits = _passes.train(x, layer.vectors, layer.counters)
    _passes.backward(torch.ones_like(y), x, None, left, bits)
    alive = [weakref.ref(t) for t in (x, y, *layer.vectors, *layer.counters)]
    del layer, x, y, left, bits
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_an_update_is_counted_by_the_versions_of_what_it_wrote_once():
    layer, x = Given(), torch.randn(4, C)
    for _ in range(3):
        before = [t._version for t in (x, *layer.vectors, *layer.counters)]
        _passes.train(x, layer.vectors, layer.counters)
        after = [t._version for t in (x, *layer.vectors, *layer.counters)]
        assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0, 0, 1, 1, 1, 1]


def test_the_number_of_threads_of_a_kept_call_is_the_one_that_is_set():
    layer, x = Given(), torch.randn(32, C, 40, 40)
    before = cubn.get_num_threads()
    try:
        results = []
        for n in (1, 2, 1, 2):
            cubn.set_num_threads(n)
            results.append(_passes.train(x, (*layer.vectors[:2], None, None))[0])
    finally:
        cubn.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_numbers_of_a_kind_that_the_first_call_refuses_the_second_refuses():
    x, layer = torch.randn(4, C), Given()
    for run in (_passes.train, _passes.frozen, _passes.inference):
        run(x, layer.vectors, eps=0.5)
        for wrong in (True, torch.tensor(0.5), Decimal("0.5"), "0.5"):
            with pytest.raises(TypeError, match="eps must be a real number"):
                run(x, layer.vectors, eps=wrong)
    for wrong in (True, torch.tensor(0.5), Decimal("0.5"), "0.5"):
        with pytest.raises(TypeError, match="momentum must be a real number"):
            _passes.train(x, layer.vectors, momentum=wrong)
    for number in (1, np.float64(0.5), np.float32(0.5)):
        for _ in range(2):
            state = layer.state(momentum=float(number))
            cubn.forward_train(x, state)
            _passes.train(x, layer.vectors, momentum=number)
            assert torch.equal(layer.mean, state.running_mean)


def test_statistics_made_in_inference_mode_are_left_as_they_were_when_they_are_refused():
    x = torch.randn(4, C)
    for warm in (False, True):
        _calls.clear()
        if warm:
            _passes.train(x, Given().vectors, Given().counters)
        with torch.inference_mode():
            layer = Given()
        before = [t.clone() for t in (*layer.vectors, *layer.counters)]
        with pytest.raises(RuntimeError, match="inference"):
            _passes.train(x, layer.vectors, layer.counters)
        assert all(map(torch.equal, before, (*layer.vectors, *layer.counters)))
        with torch.inference_mode():
            _passes.train(x, layer.vectors, layer.counters)
        assert layer.counters.num_batches_tracked == 1


def test_all_layouts_share_the_counters_that_nobody_reads():
    _calls.clear()
    for n in range(2, 10):
        _passes.train(torch.zeros(n, C), (None, None, *Given().vectors[2:]))
    assert len({entry.value.uncounted.tracked for entry in TRAININGS.entries.values()}) == 1
    assert len(TRAININGS.entries) == 8
