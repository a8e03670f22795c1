"""Which layer of a model breaks validation: named, measured, and the model as it was."""

import copy
import json
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.health import train_eval_gap  # noqa: E402


def model(norm=nn.BatchNorm2d):
    """Trained until its running statistics are those of the batches."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(part for i in range(3) for part in (nn.Conv2d(2 if i == 0 else 6, 6, 3), norm(6), nn.ReLU())),
        nn.Dropout(0.5),
    )
    with torch.no_grad():
        for i in range(60):
            net(x(i))
    return net


def x(seed=100, size=32):
    return torch.randn(size, 2, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.every_value
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, cubn.torch.BatchNorm2d])
@pytest.mark.parametrize("guilty", ["1", "4", "7"])
def test_the_layer_at_fault_is_named_with_its_channel(norm, guilty):
    net = model(norm)
    healthy = train_eval_gap(net, [x()])
    assert healthy.total < 0.2
    net.get_submodule(guilty).running_var[5] *= 0.01
    found = train_eval_gap(net, [x()])
    first, *others = found.layers
    assert first.name == guilty and first.worst[0] == 5 and first.local > 1
    assert first.alone > 3 * max(layer.alone for layer in others)
    assert first.remaining < 0.2 < min(found.total, 1), "with it alone by the batch, all is well"
    assert guilty in str(found).splitlines()[3] and json.loads(found.to_json())["layers"][0]["name"] == guilty


def test_the_gap_is_between_outputs_in_training_and_in_evaluation():
    net = model()[:-1]  # no dropout
    net[1].running_mean += 1
    found = train_eval_gap(net, [x()])
    with torch.no_grad(), cubn.torch.keep_statistics(net):
        by_running = net.eval()(x())
        by_batch = net.train()(x())
    expected = ((by_running - by_batch).square().sum() / by_batch.square().sum()).sqrt().item()
    assert found.total == pytest.approx(expected, rel=1e-4)
    assert {layer.name for layer in found.layers} == {"1", "4", "7"}


def test_alone_is_what_one_layer_in_evaluation_does_and_remaining_what_all_others_do():
    net = model()[:-1]
    net[4].running_mean += 1
    found = {layer.name: layer for layer in train_eval_gap(net, [x()]).layers}
    for name in found:
        for in_evaluation, value in (({name}, found[name].alone), (found.keys() - {name}, found[name].remaining)):
            with torch.no_grad(), cubn.torch.keep_statistics(net):
                expected = copy.deepcopy(net).train()(x())
                mixed = copy.deepcopy(net).train()
                for other in in_evaluation:
                    mixed.get_submodule(other).eval()
                off = mixed(x()) - expected
            assert value == pytest.approx((off.square().sum() / expected.square().sum()).sqrt().item(), rel=1e-3)


def test_losses_are_weighed_by_samples():
    net = model()[:-1]
    net[7].running_mean += 1
    parts = [(x(0, 8), torch.zeros(())), (x(1, 24), torch.ones(()))]
    loss = lambda y, target: y.mean() * (1 + target)  # noqa: E731
    found = train_eval_gap(net, parts, loss=loss)
    alone = [train_eval_gap(net, [part], loss=loss).losses[0] for part in parts]
    assert found.losses[0] == pytest.approx(alone[0] / 4 + alone[1] * 3 / 4, rel=1e-5)
    assert found.measure == "loss" and found.total == pytest.approx(found.losses[1] - found.losses[0])


def test_masked_positions_and_what_is_fused_are_no_part_of_a_layer_s_statistics():
    net = cubn.torch.BatchNormAddReLU1d(3).train()
    inputs, residual, mask = torch.randn(8, 3, 5), torch.randn(8, 3, 5), torch.rand(8, 5) > 0.3
    inputs[~mask.unsqueeze(1).expand(8, 3, 5)] = 100
    with torch.no_grad():
        for _ in range(200):
            net(inputs, residual, mask)
    found = train_eval_gap(net, [{"input": inputs, "residual": residual, "mask": mask}])
    assert found.layers[0].local < 0.03  # the unbiased variance


def everything(net):
    modes = [module.training for module in net.modules()]
    hooks = [len(module._forward_pre_hooks) for module in net.modules()]
    buffers = [(id(buffer), buffer.clone()) for buffer in net.buffers()]
    return modes, hooks, buffers, torch.get_rng_state()


def assert_as_before(net, before):
    modes, hooks, buffers, rng = everything(net)
    assert (modes, hooks) == before[:2] and torch.equal(rng, before[3])
    for (ours, value), (theirs, expected) in zip(buffers, before[2], strict=True):
        assert ours == theirs and torch.equal(value, expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, cubn.torch.BatchNorm2d])
def test_a_model_is_left_as_it_was(norm):
    net = model(norm)
    net[4].eval()
    before = everything(net)
    train_eval_gap(net, [x(), [x(1), "a label"]])
    assert_as_before(net, before)


def test_a_model_is_left_as_it_was_by_an_exception():
    class Fails(nn.Module):
        def forward(self, y):
            torch.rand(1)
            raise KeyError

    net = model().append(Fails())
    before = everything(net)
    with pytest.raises(KeyError):
        train_eval_gap(net, [x()])
    assert_as_before(net, before)


def test_ctrl_c_while_a_run_puts_back_what_it_lent_leaves_the_model_as_it_was(monkeypatch):
    @contextmanager
    def interrupted(model, devices):
        yield
        raise KeyboardInterrupt

    net = model()
    before = everything(net)
    monkeypatch.setattr("cubn.torch._health.gap.unchanged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_eval_gap(net, [x()])
    assert_as_before(net, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_type_are_measured_and_left_as_they_were(dtype):
    net = model().to(dtype)
    before = everything(net)
    assert 0 < train_eval_gap(net, [x().to(dtype)]).total < 0.3
    assert_as_before(net, before)


def test_frozen_layers_and_those_that_are_not_called_are_left_out():
    net = model(cubn.torch.BatchNorm2d)
    net[4].freeze()
    net.unused = nn.BatchNorm1d(3)
    net.forward = lambda y: net[:9](y)
    assert {layer.name for layer in train_eval_gap(net, [x()], contributions=False).layers} == {"1", "7"}


def test_a_layer_called_twice_has_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, momentum=1.0)

        def forward(self, y):
            return self.norm(y) + self.norm(5 * y)

    net = Twice()
    y = torch.randn(64, 4)
    net.norm(2 * y)
    (layer,) = train_eval_gap(net, [y]).layers
    assert layer.local == pytest.approx(1.118, rel=0.05)  # sqrt(((1/2 - 1)**2 + (5/2 - 1)**2) / 2)


def test_batches_that_do_not_fit_are_refused():
    net = model()
    with pytest.raises(TypeError, match=r"train_eval_gap: batches must be tensors, .*; got a str\."):
        train_eval_gap(net, ["x"])
    with pytest.raises(TypeError, match=r"train_eval_gap: batches must be pairs of an input and a target"):
        train_eval_gap(net, [x()], loss=nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r"train_eval_gap: subject must have batch norms with running statistics"):
        train_eval_gap(nn.Linear(2, 2), [torch.ones(3, 2)])


def test_a_lazy_layer_that_has_no_statistics_yet_is_refused():
    with pytest.raises(ValueError, match=r"^train_eval_gap: subject must have all its buffers; got a lazy 0\."):
        train_eval_gap(nn.Sequential(nn.LazyBatchNorm2d()), [x()])
