"""One update of the running statistics in each step, to the bit, however the forward is called."""

import functools
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim import swa_utils  # noqa: E402
from torch.utils import checkpoint as checkpoints  # noqa: E402

import cubn  # noqa: E402
import cubn.torch  # noqa: E402
from cubn import _calls  # noqa: E402
from cubn.torch._passes.recomputation import recomputing  # noqa: E402
from tests.torch.training import assert_like_state, assert_same, batches, network, statistics, step, train  # noqa: E402


def checkpointed(model, **options):
    return lambda x: checkpoints.checkpoint(model, x, **options)


def test_a_training_forward_is_one_update():
    layer, state = cubn.torch.BatchNorm1d(6), cubn.BatchNormState(6)
    for x in batches():
        step(layer, x)
        cubn.forward_train(x.numpy(), state)
    assert_like_state(layer, state)
    assert layer.num_batches_tracked == 3


# --- activation checkpointing -----------------------------------------------------------------------------------------


def test_torch_still_tells_a_backward_pass_from_a_forward():
    """By a function of its own, which may go or change."""
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(recomputing()))
    y = checkpoints.checkpoint(lambda x: seen.append(recomputing()) or x.sin(), x, use_reentrant=False)
    y.backward()
    seen.append(recomputing())
    assert seen == [False, True, True, False]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing(use_reentrant, momentum):
    expected = train(network(momentum=momentum))
    model = network(momentum=momentum)
    assert_same(train(model, checkpointed(model, use_reentrant=use_reentrant)), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_in_checkpoints(use_reentrant):
    expected, model = train(network()), network()
    inner = checkpointed(model[:3], use_reentrant=use_reentrant)
    assert_same(
        train(model, lambda x: checkpointed(lambda x: model[3:](inner(x)), use_reentrant=use_reentrant)(x)), expected
    )


def test_an_empty_batch_is_counted_once():
    layer = cubn.torch.BatchNorm1d(6)
    x = torch.empty(0, 6, requires_grad=True)
    checkpoints.checkpoint(layer, x, use_reentrant=True).sum().backward()
    assert layer.num_batches_tracked == 1
    assert (layer.skipped == 1).all()


def test_a_checkpointed_function():
    """It has no module, and its statistics are arguments."""

    def run(wrap):
        mean, var = torch.zeros(6), torch.ones(6)
        for x in batches():
            x.requires_grad_()
            wrap(lambda x: cubn.torch.functional.batch_norm(x, mean, var, training=True), x).sin().sum().backward()
        return [mean, var]

    again = functools.partial(checkpoints.checkpoint, use_reentrant=False)
    assert_same(run(again), run(lambda f, x: f(x)))


POLICIES = {
    "nothing": lambda context, op, *args, **kwargs: checkpoints.CheckpointPolicy.MUST_RECOMPUTE,
    "matmul": [torch.ops.aten.addmm.default],
    "batch norm": [torch.ops.cubn.batch_norm_train.default],
    "everything": lambda context, op, *args, **kwargs: checkpoints.CheckpointPolicy.MUST_SAVE,
}


@pytest.mark.parametrize("saved", POLICIES)
def test_selective_checkpointing(saved):
    expected, model = train(network()), network()
    contexts = functools.partial(checkpoints.create_selective_checkpoint_contexts, POLICIES[saved])
    _calls.clear()
    assert_same(train(model, checkpointed(model, use_reentrant=False, context_fn=contexts)), expected)


# --- calls that are not steps -----------------------------------------------------------------------------------------


def test_an_overflown_step_that_is_taken_again():
    """A scaler of which the first scale is too large for float16 gradients."""

    def run(scale):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        attempts = 0
        for x in batches():
            done = False
            while not done:
                with cubn.torch.keep_statistics(model) as kept:
                    attempts += 1
                    optimizer.zero_grad()
                    scaler.scale(model(x).half().sin().float().sum()).backward()
                    scaler.step(optimizer)
                    before = scaler.get_scale()
                    scaler.update()
                    if done := scaler.get_scale() >= before:
                        kept.release()
        return attempts, list(model.state_dict().values()) + list(statistics(model).values())

    (attempts, got), (fewest, expected) = run(2.0**18), run(2.0**8)
    assert fewest == 3 < attempts
    assert_same(got, expected)


# --- gradient accumulation --------------------------------------------------------------------------------------------


def test_each_micro_batch_is_an_update():
    model, layers = network(), [cubn.BatchNormState(5), cubn.BatchNormState(4)]
    seen = []
    for layer in (model[1], model[4]):
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().numpy()))
    for x in batches(4):
        step(model, x)  # and no optimiser's
    for state, inputs in zip(layers, (seen[::2], seen[1::2]), strict=True):
        for x in inputs:
            cubn.forward_train(x, state)
    assert_like_state(model[1], layers[0])
    assert_like_state(model[4], layers[1])
    assert model[1].num_batches_tracked == 4


# --- other ways to call, copy and restart -----------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """A function that compiles, without the compiler's own steps of no interest here."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, backend="aot_eager")
    torch._dynamo.reset()


OF_COMPILERS = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own


@OF_COMPILERS
def test_compiled(compiled):
    expected, model = train(network()), network()
    assert_same(train(model, compiled(model, fullgraph=True)), expected)


@OF_COMPILERS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_compiled_forward_that_is_checkpointed(compiled, use_reentrant):
    """What is compiled cannot ask whether it is computed again; the operators in it do."""
    expected, model = train(network()), network()
    forward = checkpointed(compiled(model, fullgraph=True), use_reentrant=use_reentrant)
    assert_same(train(model, forward), expected)


@OF_COMPILERS
def test_a_checkpoint_in_a_compiled_forward(compiled):
    expected, model = train(network()), network()
    inner = checkpointed(model[:4], use_reentrant=False)
    assert_same(train(model, compiled(lambda x: model[4](inner(x)), fullgraph=True)), expected)


@OF_COMPILERS
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own, where a graph is broken
def test_a_compiled_model_pools_as_another(compiled):
    model, expected = network(), network()
    forward = compiled(model)
    for x in batches():
        step(model, x, forward)
        step(expected, x)
    for m, call in ((model, forward), (expected, expected)):
        with cubn.torch.accumulate(m):
            for x in batches():
                step(m, x, call)
    assert_same(statistics(model), statistics(expected))
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models(use_buffers):
    """Averages beside a training do not change it; theirs of the statistics are torch's, of the same numbers."""
    expected, model = train(network()), network()
    twin = network(nn.BatchNorm1d)
    averaged, averaged_twin = (swa_utils.AveragedModel(m, use_buffers=use_buffers) for m in (model, twin))
    seen = []
    for x in batches():
        seen += step(model, x)
        twin.load_state_dict(model.state_dict())
        averaged.update_parameters(model)
        averaged_twin.update_parameters(twin)
    assert_same(seen, expected[: len(seen)])
    assert_same(list(statistics(model).values()), expected[-len(statistics(model)) :])
    assert_same(averaged.state_dict(), averaged_twin.state_dict())
    assert averaged.module[1].running_mean.equal(model[1].running_mean) is (not use_buffers)


def test_update_bn_averages_over_the_loader():
    """Whatever there was before, a batch that was passed over too."""
    layer, state = cubn.torch.BatchNorm1d(6), cubn.BatchNormState(6, momentum=None)
    layer(torch.full((4, 6), torch.inf))
    swa_utils.update_bn(batches(), layer)
    for x in batches():
        cubn.forward_train(x.numpy(), state)
    assert_like_state(layer, state)


def resumed(model, optimizer, momentum):
    """Another model and optimizer, from what a file holds of these."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    other = network(momentum=momentum)
    other.load_state_dict(stored["model"])
    optimizer = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    optimizer.load_state_dict(stored["optimizer"])
    return other, optimizer


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_training_that_is_resumed_from_a_file(momentum):
    def run(resume_at):
        model = network(momentum=momentum)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        seen = []
        for i, x in enumerate(batches(4)):
            if i == resume_at:
                model, optimizer = resumed(model, optimizer, momentum)
            optimizer.zero_grad()
            seen += step(model, x)
            optimizer.step()
        return seen + list(model.state_dict().values())

    assert_same(run(2), run(None))


def test_a_cumulative_average_that_is_resumed_after_a_skip_weighs_all_batches():
    """`skipped` is in no file: the limit that the docs name."""
    layer, resumed = (cubn.torch.BatchNorm1d(6, momentum=None) for _ in range(2))
    first, second = batches(2)
    layer(first)
    layer(torch.full((4, 6), torch.nan))
    resumed.load_state_dict(layer.state_dict())
    state = cubn.BatchNormState.from_arrays(
        running_mean=resumed.running_mean.numpy().copy(),
        running_var=resumed.running_var.numpy().copy(),
        momentum=None,
        tracked=2,
    )
    resumed(second)
    cubn.forward_train(second.numpy(), state)
    assert_like_state(resumed, state)
    layer(second)
    assert not np.array_equal(layer.running_mean, resumed.running_mean)
