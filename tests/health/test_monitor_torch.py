"""Models of PyTorch: whatever holds their buffers, at a cost that is counted; and validation, which comes later."""

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import cubn.health  # noqa: E402
import cubn.torch  # noqa: E402
from cubn import health  # noqa: E402
from cubn.health import HealthWarning, train_eval_gap  # noqa: E402

Monitor = partial(health.Monitor, every=1)


def model(*norms):
    torch.manual_seed(0)
    return nn.Sequential(*(part for norm in norms for part in (nn.Linear(4, 4), norm, nn.ReLU())))


def x(seed=0):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))


def test_torch_s_and_cubn_s_modules_are_read_side_by_side():
    net = model(nn.BatchNorm1d(4), cubn.torch.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False, momentum=None))
    with Monitor(net) as monitor:
        for seed in range(3):
            net(x(seed))
            monitor.step()
    assert list(monitor.history) == ["1", "4", "7"]
    for name, layer in monitor.history.items():
        module = net.get_submodule(name)
        assert (layer.running_mean[-1] == module.running_mean.numpy()).all()
        assert (layer.running_var[-1] == module.running_var.numpy()).all()
        assert layer.tracked[:, 0].tolist() == [1, 2, 3] and not layer.skipped.any()
    assert monitor.history["7"].momentum is None and (monitor.history["7"].gamma == 1).all()


def test_skipped_batches_of_cubn_s_modules_are_counted():
    net, bad = model(cubn.torch.BatchNorm1d(4), nn.BatchNorm1d(4)), x()
    monitor = Monitor(net, on_finding=lambda found: None)
    net(bad)
    monitor.step()
    bad[0] = np.inf
    net(bad)
    monitor.step()
    assert (monitor.history["1"].skipped[-1] == 1).all() and not monitor.history["4"].skipped.any()


def test_buffers_that_are_replaced_are_followed():
    net = model(nn.BatchNorm1d(4))
    monitor = Monitor(net)
    state = {name: value.clone() + 1 for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    monitor.step()
    assert (monitor.history["1"].running_var == 2).all()


def test_batch_norms_that_are_no_longer_what_they_were_are_refused():
    net = model(nn.BatchNorm1d(4))
    monitor = Monitor(net)
    net[1].running_mean = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"step: subject must keep .*; got 5 channels instead of 4\. Make a new Monitor"
    ):
        monitor.step()
    net[1].running_mean = None
    with pytest.raises(ValueError, match=r"step: subject must keep .*; got no running_mean\."):
        monitor.step()


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, lambda net: net.to_empty(device="cpu")])
def test_another_type_or_other_memory_is_followed(change):
    net = model(nn.BatchNorm1d(4))
    monitor = Monitor(net, on_finding=lambda found: None)
    monitor.step()
    change(net)
    monitor.step()
    assert np.array_equal(monitor.history["1"].running_var[-1], net[1].running_var.float().numpy(), equal_nan=True)


def test_the_optimizer_s_hook_records_each_step_and_goes():
    net = model(nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Monitor(net).attach(optimizer) as monitor:
        for seed in range(3):
            net(x(seed)).sum().backward()
            optimizer.step()
    optimizer.step()
    assert monitor.history.records == 3 and not optimizer._optimizer_step_post_hooks


def test_what_has_nothing_to_watch_is_refused():
    with pytest.raises(ValueError, match=r"Monitor: subject must have batch norms with running statistics; got Linear"):
        Monitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must have all its buffers; got a lazy 0\. Call it once before\."):
        Monitor(nn.Sequential(nn.LazyBatchNorm1d()))


class Counting(TorchDispatchMode):
    """Which operations of torch are run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append(operation._schema.name.removeprefix("aten::"))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, cubn.torch.BatchNorm1d])
def test_a_step_copies_all_layers_at_once_and_does_nothing_else(norm):
    net = model(*(norm(4) for _ in range(12)))
    monitor = Monitor(net)
    monitor.step()
    with Counting() as counting:
        monitor.step()
    copies = [name for name in counting.seen if name not in ("reshape", "view", "unsqueeze", "detach", "alias")]
    assert sorted(copies) == ["cat", "cat", "stack"] or sorted(copies) == ["cat", "cat", "cat"]


# --- validation that explodes while training is fine ------------------------------------------------------------------


def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(data.target)


def network(width=16, depth=6):
    torch.manual_seed(0)
    layers, channels = [], 1
    for i in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        if i == 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


EPOCH, BATCH, JUMP = 44, 32, 100
"""Steps of an epoch, images of a batch; the step at which the learning rate becomes 25 times as large."""


def losses(net, images, labels):
    """On the same images, by the batch's statistics and by the running ones."""
    with torch.no_grad(), cubn.torch.keep_statistics(net):
        by_running = nn.functional.cross_entropy(net.eval()(images), labels).item()
        by_batch = nn.functional.cross_entropy(net.train()(images), labels).item()
    return by_batch, by_running


@pytest.fixture(scope="module")
def exploded():
    """A model whose validation has just exploded, its monitor, and the losses of each validation."""
    images, labels = digits()
    net, validations, told = network(), {}, []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with health.Monitor(net, on_finding=told.append).attach(optimizer) as monitor:
        for step in range(3 * EPOCH):
            if step == JUMP:
                optimizer.param_groups[0]["lr"] = 0.5
            if step % EPOCH == 0:
                order = torch.randperm(1437, generator=torch.Generator().manual_seed(step))
            batch = order[step % EPOCH * BATCH :][:BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            if (step + 1) % EPOCH == 0:
                validations[step + 1] = losses(net, images[1437:], labels[1437:])
    yield net, monitor, validations
    torch.set_num_threads(threads)


def test_the_monitor_sees_that_running_statistics_are_behind_before_validation_does(exploded):
    _, monitor, validations = exploded
    exploding = [step for step, (batch, running) in validations.items() if running > max(3 * batch, np.log(10))]
    assert exploding == [3 * EPOCH], validations
    by_batch, _ = validations[3 * EPOCH]
    assert by_batch < 1.5, "training is fine"
    told = [noticed.step for noticed in monitor.findings if noticed.finding.rule == "running-behind"]
    assert JUMP < min(told) <= JUMP + 16 < exploding[0]
    assert min(noticed.step for noticed in monitor.findings) > JUMP, "the healthy part was told of"


def test_the_gap_is_that_of_the_losses_and_names_the_layers(exploded):
    net, monitor, validations = exploded
    images, labels = digits()
    found = train_eval_gap(net, [(images[1437:], labels[1437:])], loss=nn.functional.cross_entropy)
    by_batch, by_running = validations[3 * EPOCH]
    assert found.losses == pytest.approx((by_batch, by_running), rel=1e-3)
    assert found.total == pytest.approx(by_running - by_batch, rel=1e-3)
    assert {noticed.finding.layer for noticed in monitor.findings} <= {layer.name for layer in found.layers}
    assert max(layer.local for layer in found.layers) > 0.3


def test_a_warning_of_the_story_says_what_to_do():
    state = cubn.BatchNormState(2)
    monitor = Monitor(state)
    with pytest.warns(HealthWarning, match=r"in evaluation the layer's outputs would be .* cubn\.recalibrate"):  # noqa: PT031
        for step in range(40):
            cubn.forward_train(1.4**step * np.random.default_rng(step).standard_normal((16, 2, 9)), state)
            monitor.step()
