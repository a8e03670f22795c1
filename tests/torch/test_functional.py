"""functional.batch_norm beside torch.nn.functional's."""

import doctest

import pytest

torch = pytest.importorskip("torch")

from cubn.torch import functional  # noqa: E402
from tests.torch.comparing import batch, same  # noqa: E402

F = torch.nn.functional


def vectors(dtype=torch.float64):
    """running_mean, running_var, weight and bias."""
    return [torch.linspace(low, 2, 3, dtype=dtype) for low in (-1, 0.5, 0.5, -2)]


def close(a, b):
    """To a few roundings of float64, in which sums of some ten values are taken."""
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("training", "given"),
    [(True, 4), (True, 3), (True, 2), (True, 0), (False, 4), (False, 3), (False, 2)],
    ids=lambda value: str(value),
)
def test_it_is_torchs(training, given):
    results = []
    for function in (functional.batch_norm, F.batch_norm):
        x = batch((4, 3, 5), dtype=torch.float64).requires_grad_()
        running_mean, running_var, *parameters = (v if i < given else None for i, v in enumerate(vectors()))
        parameters = [p if p is None else p.requires_grad_() for p in parameters]
        y = function(x, running_mean, running_var, *parameters, training, 0.3, 1e-3)
        y.backward(batch(y.shape, seed=1, dtype=torch.float64))
        gradients = [p.grad for p in parameters if p is not None]
        results.append([y.detach(), x.grad, *gradients, *([running_mean, running_var] if given else [])])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_residual_relu_and_mask_are_parts_of_it():
    x, residual = (batch((4, 3, 5), seed, torch.float64) for seed in (0, 1))
    mask = torch.arange(20).reshape(4, 5) % 3 > 0
    mean, var, weight, bias = vectors()
    y = functional.batch_norm(x, mean, var, weight, bias, True, residual=residual, relu=True, mask=mask)
    present = mask[:, None].expand_as(x)
    chosen = x.movedim(1, -1)[mask]  # (positions, C)
    expected = F.batch_norm(chosen, None, None, weight, bias, True)
    close(y.movedim(1, -1)[mask], (expected + residual.movedim(1, -1)[mask]).relu())
    assert not y[~present].any()


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan"), None])
def test_a_momentum_of_no_average_is_refused_before_anything_changes(momentum):
    mean, var, weight, bias = vectors()
    before = mean.clone(), var.clone()
    with pytest.raises(ValueError, match=r"^batch_norm: momentum must be from 0 to 1; got"):
        functional.batch_norm(batch((4, 3)), mean, var, weight, bias, True, momentum)
    assert same(mean, before[0]) and same(var, before[1])


def test_without_training_there_must_be_statistics():
    with pytest.raises(ValueError, match=r"^batch_norm: running_var must be given unless training; got None\."):
        functional.batch_norm(batch((4, 3)), torch.zeros(3), None)
    for one in ((torch.zeros(3), None), (None, torch.ones(3))):
        with pytest.raises(ValueError, match=r"^batch_norm: running_(mean|var) must be given"):
            functional.batch_norm(batch((4, 3)), *one, training=True)


def test_an_empty_batch_is_checked_as_another_is():
    for n in (0, 4):
        for i in range(4):
            wrong = [torch.ones(2 if i == j else 3) for j in range(4)]
            with pytest.raises(ValueError, match=r"^batch_norm: \w+ must have shape \(3,\)"):
                functional.batch_norm(torch.zeros(n, 3), *wrong, training=True)
        with pytest.raises(TypeError, match=r"^batch_norm: (input|x) must"):
            functional.batch_norm(torch.zeros(n, 3).long(), torch.zeros(3), torch.ones(3), training=True)


def test_a_single_value_is_refused_as_torch_refuses_it():
    for function in (functional.batch_norm, F.batch_norm):
        with pytest.raises(ValueError, match=r"more than (one|1) value per channel"):
            function(torch.ones(1, 3), None, None, training=True)


def test_under_autocast_types_are_torchs():
    x = batch((4, 3, 2, 2))
    convolution = torch.nn.Conv2d(3, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        between = convolution(x)
        types = []
        for function in (functional.batch_norm, F.batch_norm):
            mean, var, weight, bias = (v.requires_grad_(i > 1) for i, v in enumerate(vectors(torch.float32)))
            y = function(between, mean, var, weight, bias, True)
            (gradient,) = torch.autograd.grad(y.float().sum(), weight, retain_graph=True)
            types.append((y.dtype, gradient.dtype, mean.dtype))
    assert types[0] == types[1] == (torch.bfloat16, torch.float32, torch.float32)


def test_narrow_values_go_with_wide_parameters():
    x, (mean, var, weight, bias) = batch((4, 3), dtype=torch.float16), vectors(torch.float32)
    y = functional.batch_norm(x, mean, var, weight, bias, True)
    expected = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    torch.testing.assert_close(y.double(), expected, rtol=2.0**-11 + 1e-6, atol=1e-6)
    assert y.dtype == torch.float16


def test_the_example_prints_what_it_says():
    failed, tried = doctest.testmod(functional)
    assert tried and not failed
