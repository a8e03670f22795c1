"""What training leaves in a module's buffers: averages, skipped batches, batches of no value and of one."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from tests.torch.comparing import PAIRS, batch, close, same, statistics, step  # noqa: E402

# --- running statistics -----------------------------------------------------------------------------------------------


def test_the_average_of_all_batches_is_that_of_their_statistics():
    module = cubn.torch.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    batches = [batch((n, 3), seed=n, dtype=torch.float64) for n in (5, 2, 9, 4, 3)]
    for i, x in enumerate(batches):
        module(x)
        if i == 2:  # these are no batches of the average
            module(torch.full((4, 3), torch.nan, dtype=torch.float64))
            module(batch((0, 3), dtype=torch.float64))
    means, variances = (
        torch.stack(each).mean(0) for each in zip(*((x.mean(0), x.var(0)) for x in batches), strict=True)
    )
    assert close(module.running_mean, means, 9) and close(module.running_var, variances, 9)
    assert module.num_batches_tracked == len(batches) + 2 and module.skipped.tolist() == [2, 2, 2]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_is_counted_and_leaves_its_channels_alone(momentum):
    module, clean = (cubn.torch.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    x = batch((4, 3, 5, 2))
    bad = x.clone()
    bad[1, 2, 3, 1] = torch.nan
    for each in (x, bad, 3 * x):
        module(each)
    for each in (x, x, 3 * x):
        clean(each)
    assert module.num_batches_tracked == 3 and module.skipped.tolist() == [0, 0, 1]
    assert torch.equal(module.running_var[:2], clean.running_var[:2])
    without = cubn.torch.BatchNorm2d(3, momentum=momentum)
    for each in (x, 3 * x):
        without(each)
    assert module.running_var[2] == without.running_var[2] and module.running_mean[2] == without.running_mean[2]


def test_statistics_that_are_not_finite_heal_with_a_batch_that_is():
    module = cubn.torch.BatchNorm2d(3)
    module.running_var[1] = torch.inf
    x = batch((4, 3, 5, 2))
    module(x)
    assert torch.allclose(module.running_var[1], x[:, 1].var()) and module.running_var.isfinite().all()


def test_statistics_that_are_not_tracked_any_more_stay():
    module, reference = cubn.torch.BatchNorm2d(3), nn.BatchNorm2d(3)
    for each in (module, reference):
        each(batch((4, 3, 5, 2)))
        each.track_running_stats = False
    before = statistics(module)
    assert torch.allclose(module(batch((4, 3, 5, 2), 1)), reference(batch((4, 3, 5, 2), 1)), atol=1e-5)
    assert all(same(t, before[name]) for name, t in statistics(module).items())


def test_momentum_that_is_no_weight_is_refused():
    module = cubn.torch.BatchNorm2d(3, momentum=1.5)
    with pytest.raises(ValueError, match=r"momentum must be None or from 0 to 1"):
        module(batch((4, 3, 5, 2)))
    assert module.num_batches_tracked == 0


# --- few values -------------------------------------------------------------------------------------------------------

EMPTY = [
    ("1d", (0, 3)),
    ("1d", (0, 3, 5)),
    ("1d", (4, 3, 0)),
    ("2d", (0, 3, 4, 4)),
    ("2d", (2, 3, 0, 4)),
    ("3d", (0, 3, 2, 2, 2)),
]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dimensions", "shape"), EMPTY)
def test_an_empty_batch_is_to_the_module_what_it_is_to_torchs(dimensions, shape, training, momentum):
    ours, theirs = (cls(3, momentum=momentum).train(training) for cls in PAIRS[dimensions])
    found, expected = (step(module, torch.zeros(shape)) for module in (ours, theirs))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert all(same(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    expected = statistics(theirs)
    assert all(same(t, expected[name]) for name, t in statistics(ours).items())
    assert ours.skipped.tolist() == [int(training)] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_empty_batch_keeps_dtype_and_layout_and_passes_through_what_is_fused(dtype):
    module = cubn.torch.BatchNormAddReLU2d(3)
    x = torch.zeros(0, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    y, dx, dresidual = step(module, x, x)
    assert y.shape == dx.shape == dresidual.shape == x.shape
    assert y.dtype == dx.dtype == dresidual.dtype == dtype
    assert module.weight.grad.tolist() == [0, 0, 0] and module.num_batches_tracked == 1
    assert cubn.torch.BatchNorm2d(3, affine=False, track_running_stats=False)(x).shape == x.shape


@pytest.mark.parametrize(
    ("dimensions", "shape"), [("1d", (1, 3)), ("1d", (1, 3, 1)), ("2d", (1, 3, 1, 1)), ("3d", (1, 3, 1, 1, 1))]
)
def test_one_value_per_channel_cannot_be_trained_on(dimensions, shape):
    module, theirs = (cls(3) for cls in PAIRS[dimensions])
    for each in (module, theirs):
        with pytest.raises(ValueError, match=r"more than (one|1) value per channel"):
            each(torch.ones(shape))
    assert all(same(a, b) for a, b in zip(module.buffers(), PAIRS[dimensions][0](3).buffers(), strict=True))
    assert module.eval()(torch.ones(shape)).shape == shape
    assert module.train().freeze()(torch.ones(shape)).shape == shape
    with pytest.raises(ValueError, match="more than one value per channel"):
        PAIRS[dimensions][0](3, track_running_stats=False).eval()(torch.ones(shape))
