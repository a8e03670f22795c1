"""Folding: a layer does its batch norm too, within rounding, wherever that is proved, and is left alone elsewhere."""

import copy
import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.torch import convert, fold  # noqa: E402
from tests.torch.comparing import batch  # noqa: E402
from tests.torch.networks import resnet18  # noqa: E402

LAYERS = {
    "Linear": (lambda: nn.Linear(4, 6), (5, 4), "1d"),
    "no bias": (lambda: nn.Linear(4, 6, bias=False), (5, 4), "1d"),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8), "1d"),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5), "2d"),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2, stride=2), (2, 4, 4, 4, 4), "3d"),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5), "2d"),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 8), "1d"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), "2d"),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3), "3d"),
    "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), "2d"),
}


def trained(model):
    """In eval mode, with parameters and statistics that are all different."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def close(y, expected, terms):
    """Of float64, as near as sums of so many products come."""
    bound = 8 * terms * torch.finfo(torch.float64).eps * (1 + expected.abs().max())
    return y.shape == expected.shape and (y - expected).abs().max() <= bound


@pytest.mark.parametrize("family", [nn, cubn.torch])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_does_the_batch_norm_after_it(name, family):
    layer, shape, dimensions = LAYERS[name]
    model = trained(nn.Sequential(layer(), getattr(family, f"BatchNorm{dimensions}")(6))).double()
    x, before = batch(shape, dtype=torch.float64), copy.deepcopy(model.state_dict())
    folded, report = fold(model, x)
    assert report.done == {"1": "part of 0"} and not report.left
    assert type(folded[0]) is type(model[0]) and folded[0].bias.requires_grad
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    expected = nn.functional.batch_norm(
        model[0](x), *(before[f"1.{each}"] for each in ("running_mean", "running_var", "weight", "bias"))
    )
    assert close(folded(x), expected, math.prod(model[0].weight.shape))
    assert report.difference <= 1e-13
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_of_16_bits_keeps_its_dtype():
    model = trained(nn.Sequential(nn.Linear(4, 6), cubn.torch.BatchNorm1d(6)))
    model[0].to(torch.bfloat16)
    folded, _ = fold(model)
    assert folded[0].weight.dtype == folded[0].bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change", [lambda m: m, convert, lambda m: convert(m, fuse=True)], ids=["torch", "cubn", "fused"]
)
def test_a_resnet_is_folded_wholly(change):
    model = change(trained(resnet18()))
    x = batch((2, 3, 32, 32))
    folded, report = fold(model, x)
    assert len(report.done) == 20 and not report.left
    assert report.done["layer2.0.downsample.1"] == "part of layer2.0.downsample.0"
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    with torch.no_grad():
        y, expected = folded(x), model(x)
    assert 0 < report.difference < 1e-5
    assert report.difference == pytest.approx(float((y - expected).abs().max() / expected.abs().max()), rel=1e-5)
    assert f"outputs differ by {report.difference:.1e}" in str(report)


def test_the_activation_of_timms_stays():
    class BatchNormAct2d(nn.BatchNorm2d):
        __module__ = "timm.layers.norm_act"
        __qualname__ = "BatchNormAct2d"

        def __init__(self, channels):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.PReLU()

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    model, x = trained(nn.Sequential(nn.Conv2d(3, 6, 1), BatchNormAct2d(6))), batch((2, 3, 4, 4))
    for each in (model, convert(copy.deepcopy(model))):
        folded, report = fold(each, x)
        assert report.done and report.difference < 1e-6
        assert list(folded.state_dict()) == ["0.weight", "0.bias", "1.act.weight"]


def test_a_batch_norm_over_another_axis_is_refused_when_it_runs():
    """Linear gives (N, L, C), and BatchNorm1d normalises L."""
    model = trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    folded, report = fold(model)
    assert report.done and folded(torch.zeros(2, 4)).shape == (2, 6)
    with pytest.raises(ValueError, match=r"^Folded: input must have 2 axes, .*; got 3 axes"):
        folded(torch.zeros(2, 6, 4))


def test_shared_weights_are_no_longer_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    trained(model)
    folded, report = fold(model, batch((3, 4)))
    assert report.done and report.difference < 1e-6
    assert torch.equal(folded[2].weight, model[2].weight)


class Own(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn, self.run = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), [forward]

    def forward(self, x):
        return self.run[0](self, x)


def without_statistics(m):
    m.bn = nn.BatchNorm2d(3, track_running_stats=False).eval()


def of_another_class(m):
    m.conv = type("StandardisedConv2d", (nn.Conv2d,), {})(3, 3, 1)


def with_its_own_forward(m):
    m.bn = type("Noisy", (nn.BatchNorm2d,), {})(3).eval()


def derived_from_cubns(m):
    m.bn = type("Noisy", (cubn.torch.BatchNorm2d,), {"forward": lambda self, x: 2 * self._normalize(x, None, None)})(3)
    m.bn.eval()


def negative(m):
    m.bn.running_var.neg_()


def plain(m, x):
    return m.bn(m.conv(x))


NOTHING = lambda m: None  # noqa: E731
LEFT = [
    ("no layer comes before it", lambda m, x: m.bn(m.conv(x) * 2), NOTHING),
    ("no layer comes before it", lambda m, x: m.bn(x), NOTHING),
    (
        "the output of the layer before it is read elsewhere too",
        lambda m, x: (lambda h: m.bn(h) + h)(m.conv(x)),
        NOTHING,
    ),
    ("of the layer before it: it is called in several places", lambda m, x: m.bn(m.conv(m.conv(x))), NOTHING),
    ("it is called in several places", lambda m, x: m.bn(m.bn(m.conv(x))), NOTHING),
    (
        "of the layer before it: the forward of the model reads its weight",
        lambda m, x: plain(m, x) * m.conv.weight.sum(),
        NOTHING,
    ),
    ("the forward of the model cannot be traced: it decides", lambda m, x: plain(m, x) if x.sum() else x, NOTHING),
    ("no forward calls it", lambda m, x: F.batch_norm(m.conv(x), None, None, training=True), NOTHING),
    ("it is in training mode", plain, lambda m: m.bn.train()),
    ("it has no running statistics", plain, without_statistics),
    (
        "the weight of the layer before it is computed by a parametrization",
        plain,
        lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    ),
    ("Noisy may do more than normalise", plain, derived_from_cubns),
    ("StandardisedConv2d before it is no convolution or linear layer", plain, of_another_class),
    ("Noisy may do more than normalise", plain, with_its_own_forward),
    ("it has hooks", plain, lambda m: m.bn.register_forward_hook(lambda *arguments: None)),
    ("of the layer before it: it has hooks", plain, lambda m: m.conv.register_forward_hook(lambda *arguments: None)),
    ("fold_into: running_var must be 0 or more", plain, negative),
]


@pytest.mark.parametrize(("why", "forward", "change"), LEFT)
def test_what_is_not_folded_is_left_with_the_reason(why, forward, change):
    model = trained(Own(forward))
    change(model)
    folded, report = fold(model)
    assert not report.done and report.left["bn"].startswith(why)
    assert repr(folded) == repr(model)
    assert all(torch.equal(value, folded.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_frozen_batch_norm_is_folded_also_in_training():
    model = convert(trained(Own(plain))).train()
    model.bn.freeze()
    assert fold(model)[1].done == {"bn": "part of conv"}


def test_a_batch_norm_with_several_paths_is_replaced_at_all():
    model = Own(plain)
    model.alias = model.bn
    folded, report = fold(trained(model), batch((2, 3, 4, 4)))
    assert report.done and folded.alias is folded.bn and not isinstance(folded.bn, nn.BatchNorm2d)


def test_an_example_needs_the_model_in_eval_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"^fold: model must be in eval mode to be compared; got training mode"):
        fold(model, torch.zeros(2, 3))
    assert model[1].num_batches_tracked == 0
