"""`keep_statistics` and `accumulate`."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import cubn  # noqa: E402
from cubn.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNormAddReLU1d,
    LazyBatchNorm1d,
    accumulate,
    keep_statistics,
)
from tests.torch.training import assert_like_state, assert_same, batches, network, statistics, step  # noqa: E402


def fail_in(block, model):
    with block(model):
        model(batches(1)[0])
        raise KeyError


INF = torch.full((4, 6), torch.inf)

# --- keep_statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [BatchNorm1d, nn.BatchNorm1d])
def test_statistics_are_put_back_in_place(norm):
    model = network(norm)
    model(batches(1)[0])
    before, at = statistics(model), [buffer.data_ptr() for buffer in model.buffers()]
    with keep_statistics(model):
        for x in (*batches(), INF):
            model(x)
        assert model[1].num_batches_tracked == 5
        assert not statistics(model)["1.running_mean"].equal(before["1.running_mean"])
    assert_same(statistics(model), before)
    assert at == [buffer.data_ptr() for buffer in model.buffers()]


def test_statistics_are_put_back_when_an_exception_passes():
    model = network()
    before = statistics(model)
    with pytest.raises(KeyError):
        fail_in(keep_statistics, model)
    assert_same(statistics(model), before)


def test_blocks_in_blocks_put_back_what_each_of_them_found():
    model = network()
    first, second, third = batches()
    before = statistics(model)
    with keep_statistics(model):
        model(first)
        between = statistics(model)
        with keep_statistics(model):
            model(second)
        assert_same(statistics(model), between)
        model(third)
    assert_same(statistics(model), before)


def test_what_is_released_stands():
    model, expected = network(), network()
    first, second = batches(2)
    with keep_statistics(model) as kept:
        model(first)
        kept.release()
        model(second)
    for x in (first, second):
        expected(x)
    assert_same(statistics(model), statistics(expected))


def test_other_buffers_get_the_values_too():
    model = network()
    model(batches(1)[0])
    before = statistics(model)
    with keep_statistics(model):
        model.double()(batches(1)[0].double())
    assert model[1].running_mean.dtype == torch.float64
    assert_same(statistics(model.float()), before)


def test_a_lazy_layer_that_was_initialised_meanwhile_is_as_new():
    layer = LazyBatchNorm1d()
    with keep_statistics(layer):
        layer(INF)
        layer(batches(1)[0])
        assert layer.skipped.sum() == 6
    assert_same(statistics(layer), statistics(BatchNorm1d(6)))
    layer = LazyBatchNorm1d()
    with keep_statistics(layer):
        pass
    assert layer.has_uninitialized_params()


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_a_backward_after_the_block_has_its_gradients(mode):
    model, expected = network(), network()
    for m in (model, expected):
        m.train(mode != "eval")
        if mode == "freeze":
            m[1].freeze()
    kept = keep_statistics(model)
    x = batches(1)[0]

    def forward(x):
        with kept:
            return model(x)

    assert_same(step(model, x, forward), step(expected, x))


# --- accumulate -------------------------------------------------------------------------------------------------------

CUTS = [[12], [4, 4, 4], [1, 9, 2], [5, 0, 7], [2, 2, 2, 2, 2, 2]]


def state_after(x, momentum, mask=None, before=None):
    """A state of the core after an update by `before`, and then one by x."""
    state = cubn.BatchNormState(x.shape[1], momentum=momentum)
    if before is not None:
        cubn.update(state, cubn.moments(before))
    cubn.update(state, cubn.moments(x, mask=mask))
    return state


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_cut_is_one_update_by_all_inputs(cut, masked, momentum, dtype):
    layer = BatchNorm2d(6, momentum=momentum)
    generator = torch.Generator().manual_seed(2)
    before, x = ((torch.randn(12, 6, 3, 5, generator=generator) * 4 - 7).to(dtype) for _ in range(2))
    mask = torch.rand(12, 3, 5, generator=generator) < 0.6 if masked else None
    masks = mask.split(cut) if masked else [None] * len(cut)
    layer(before)
    with accumulate(layer):
        for part, present in zip(x.split(cut), masks, strict=True):
            layer(part, None if part.numel() == 0 else present)
    assert_like_state(layer, state_after(x, momentum, mask, before))


def test_micro_batches_are_normalised_as_outside():
    model, expected = network(), network()
    before = statistics(model)
    got = []
    with accumulate(model):
        for x in batches():
            got += step(model, x)
            assert_same(statistics(model), before)
    assert_same(got, [tensor for x in batches() for tensor in step(expected, x)])
    assert_same([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


def test_every_layer_pools_its_own_inputs():
    """Of a layer used twice, both; of one that adds a residual, x alone."""
    twice, add = BatchNorm1d(6), BatchNormAddReLU1d(6)
    seen = {twice: [], add: []}
    for layer in seen:
        layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0].detach()))
    with accumulate(nn.ModuleList(seen)):
        for x in batches():
            add(twice(twice(x)), x)
    for layer, inputs in seen.items():
        assert_like_state(layer, state_after(torch.cat(inputs), 0.1))


def test_a_skipped_channel_is_counted_once():
    layer, x = BatchNorm1d(6, momentum=None), torch.cat(batches())
    x[10, 2] = torch.nan
    with accumulate(layer):
        for part in x.split(8):
            layer(part)
    assert layer.skipped.tolist() == [0, 0, 1, 0, 0, 0]
    assert_like_state(layer, state_after(x, None))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_recomputations_are_not_pooled(where, use_reentrant):
    layer, losses = BatchNorm1d(6), []
    with accumulate(layer):
        for x in batches():
            y = checkpoint(layer, x.requires_grad_(), use_reentrant=use_reentrant)
            losses.append(y.sin().sum())
            if where == "inside":
                losses.pop().backward()
    sum(losses, torch.zeros((), requires_grad=True)).backward()
    assert_like_state(layer, state_after(torch.cat(batches()), 0.1))


@pytest.mark.parametrize("how", ["eval", "freeze"])
def test_layers_that_do_not_train_collect_nothing(how):
    model = network()
    getattr(model[1], how)()
    before = statistics(model[1])
    with accumulate(model):
        for x in batches():
            model(x)
    assert_same(statistics(model[1]), before)
    assert model[4].num_batches_tracked == 1


def test_the_statistics_stay_when_an_exception_passes():
    model = network()
    before = statistics(model)
    with pytest.raises(KeyError):
        fail_in(accumulate, model)
    assert_same(statistics(model), before)
    model(batches(1)[0])
    assert model[1].num_batches_tracked == 1


def test_all_layers_are_updated_or_none():
    model = network()
    before = statistics(model)
    block = accumulate(model)
    block.__enter__()
    model(batches(1)[0])
    model[4].momentum = 2
    with pytest.raises(ValueError, match="momentum must be"):
        block.__exit__(None, None, None)
    assert_same(statistics(model), before)


def test_a_lazy_layer_pools_from_its_first_input_on():
    layer = LazyBatchNorm1d()
    with accumulate(layer):
        for x in batches():
            layer(x)
    assert_like_state(layer, state_after(torch.cat(batches()), 0.1))


@pytest.mark.parametrize("released", [False, True])
def test_micro_batches_that_are_not_to_count_are_not_pooled(released):
    layer, (first, second, third) = BatchNorm1d(6), batches()
    with accumulate(layer):
        layer(first)
        with keep_statistics(layer) as kept:
            layer(second)
            if released:
                kept.release()
        layer(third)
    inputs = [first, second, third] if released else [first, third]
    assert_like_state(layer, state_after(torch.cat(inputs), 0.1))


def test_a_copy_made_in_the_block_is_updated_as_ever():
    layer = BatchNorm1d(6)
    with accumulate(layer):
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for x in batches():
            layer(x)
            for each in copies:
                each(x)
    assert [each.num_batches_tracked.item() for each in (layer, *copies)] == [1, 3, 3]


def test_a_block_in_a_block_is_refused():
    model = network()
    with accumulate(model):
        model(batches(1)[0])
        with pytest.raises(ValueError, match="accumulate: model must not be in such a block already"):
            accumulate(model[1]).__enter__()
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, lambda C: BatchNorm1d(C, track_running_stats=False)])
def test_a_model_without_anything_to_update_is_refused(norm):
    with pytest.raises(ValueError) as caught, accumulate(nn.Sequential(norm(3))):
        pass
    assert str(caught.value) == (
        "accumulate: model must have batch norms of cubn.torch with running statistics; got Sequential. "
        "Call cubn.torch.convert first."
    )


@pytest.mark.parametrize("block", [accumulate, keep_statistics])
def test_what_is_no_model_is_refused(block):
    with pytest.raises(TypeError, match=f"{block.__name__}: model must be a torch.nn.Module; got an int"), block(3):
        pass
