"""The distance of the one answer from float64: the only tests with tolerances, and each follows from eps."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import cubn
from cubn import reference

EPS = 1e-5

OFFSETS = [0.0, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5]
SHAPES = [(32, 4, 56, 56), (256, 4, 7, 7), (4096, 4), (7, 4, 5000), (3, 4, 1, 9)]


# --- statistics and y, float32 data, mean / sigma from 0 to 1e5 -----------------------------------------------------


def errors(x, mean, var):
    """Relative error of var, and the error of the mean in sigma, from float64."""
    exact = reference.moments(x)
    sigma = np.sqrt(exact.var)
    return np.abs(var / exact.var - 1.0).max(), (np.abs(mean - exact.mean) / sigma).max()


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_as_near_to_float64_as_stated(backend, shape, offset):
    for seed in range(4):
        x = np.random.default_rng(seed).normal(offset, 1.0, shape).astype(np.float32)
        m = cubn.moments(x)
        of_var, of_mean = errors(x, m.mean, m.var())
        assert of_var <= 2e-7 and of_mean <= 1e-6


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_output_is_within_4_ulp_of_float64(backend, shape, offset):
    """y within 4 ulp of the largest of |gamma * xhat|, |beta| and |gamma|, from the same x in float64."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = rng.normal(offset, 1.0, shape).astype(np.float32)
        state = cubn.BatchNormState(4, eps=EPS)
        state.gamma[:], state.beta[:] = rng.normal(size=(2, 4))
        y, _ = cubn.forward_train(x, state)
        exact, batch = reference.forward_train(x, gamma=state.gamma, beta=state.beta, eps=EPS)
        scaled = reference.normalize(x, batch.mean, batch.var, gamma=state.gamma, eps=EPS)
        channels = (4, *[1] * (x.ndim - 2))
        of_parameters = np.maximum(np.abs(state.gamma), np.abs(state.beta)).reshape(channels)
        ulp = np.spacing(np.maximum(np.abs(scaled), of_parameters).astype(np.float32))
        assert (np.abs(y - exact) / ulp).max() <= 4.0


def test_mean_of_squares_would_not_pass():
    """The bounds mean something: E[x^2] - E[x]^2 in float32 misses them by orders of magnitude."""
    x = np.random.default_rng(0).normal(100.0, 1.0, (32, 4, 3136)).astype(np.float32)
    mean = x.mean((0, 2))
    of_var, _ = errors(x, mean, (x * x).mean((0, 2)) - mean * mean)
    assert of_var > 1e-4


# --- the least deviations of float32 arithmetic, as docs/numerics.md states them ------------------------------------


def stated():
    """(standard deviation, error of var) by row of the document's table."""
    text = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    table = text.split("| standard deviation | error of var |\n|---|---|\n")[1].split("\n\n")[0]
    for sigma, error in re.findall(r"^\| (\S+) \| (.+?) \|$", table, re.MULTILINE):
        yield (
            float(sigma),
            float(error.removesuffix(" %")) / 100 if "%" in error else float(error.replace("all of it", "1")),
        )


def draws(sigma, shape, dtype=np.float32):
    """Error of var, in how much there is of it, for four draws."""
    for seed in range(4):
        x = np.random.default_rng(seed).normal(0.0, sigma, shape).astype(dtype)
        yield np.abs(cubn.moments(x).var() / reference.moments(x).var - 1.0).max()


@pytest.mark.parametrize(("sigma", "error"), list(stated()))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variance_of_tiny_values_is_as_far_off_as_the_document_says(backend, shape, sigma, error):
    assert max(draws(sigma, shape)) <= error


def test_the_lower_limit_is_there(backend):
    """What the document's last rows speak of can be seen."""
    assert max(draws(1e-22, SHAPES[0])) > 0.01 and min(draws(1e-23, SHAPES[0])) > 0.9


@pytest.mark.parametrize(("shape", "dtype"), [((4096, 4), np.float32), ((32, 4, 49), np.float64)], ids=str)
def test_arithmetic_in_float64_has_no_lower_limit(backend, shape, dtype):
    assert max(draws(1e-23, shape, dtype)) <= 1e-12


# --- gradients ------------------------------------------------------------------------------------------------------

OPTIONS = [
    dict(zip(("frozen", "masked", "residual", "relu", "affine"), flags, strict=True))
    for flags in itertools.product([False, True], repeat=5)
]


def option_names(options):
    return "-".join(name for name, chosen in options.items() if chosen) or "plain"


class Layer:
    """One batch norm of shape (N, C, S) with given options, in a dtype, and a loss sum(dy * y)."""

    shape = (4, 3, 6)

    def __init__(self, options, dtype, seed=0):
        rng = np.random.default_rng(seed)
        self.options, self.dtype = options, dtype
        C = self.shape[1]
        self.values = {"x": rng.normal(1.0, 2.0, self.shape).astype(dtype)}
        if options["affine"]:
            self.values |= {"gamma": rng.normal(1.0, 0.5, C).astype(dtype), "beta": rng.normal(size=C).astype(dtype)}
        if options["residual"]:
            self.values["residual"] = rng.normal(size=self.shape).astype(dtype)
        self.dy = rng.normal(size=self.shape).astype(dtype)
        self.mask = rng.random((4, 6)) < 0.7 if options["masked"] else None
        self.running = {"running_mean": np.linspace(0.5, 1.5, C), "running_var": np.linspace(2.0, 5.0, C)}

    def forward(self, **changed):
        values = {**self.values, **changed}
        state = cubn.BatchNormState.from_arrays(
            gamma=values.get("gamma"),
            beta=values.get("beta"),
            **{name: v.astype(self.dtype) for name, v in self.running.items()},
            eps=EPS,
        )
        call = cubn.forward_frozen if self.options["frozen"] else cubn.forward_train
        return call(values["x"], state, mask=self.mask, residual=values.get("residual"), relu=self.options["relu"])

    def loss(self, **changed):
        return float((self.forward(**changed)[0] * self.dy).sum())

    def gradients(self):
        grads = cubn.backward(self.dy, self.forward()[1])
        got = {"x": grads.dx, "gamma": grads.dgamma, "beta": grads.dbeta, "residual": grads.dresidual}
        assert {name for name, g in got.items() if g is not None} == set(self.values)
        return {name: got[name] for name in self.values}


@pytest.mark.every_value
@pytest.mark.parametrize("options", OPTIONS, ids=option_names)
def test_gradients_are_slopes(backend, options):
    """Against central differences through cubn in float64, good to about eps ** (2/3) of the loss."""
    layer = Layer(options, np.float64)
    step = np.cbrt(np.finfo(np.float64).eps)
    bound = 100 * step**2
    for name, gradient in layer.gradients().items():
        value = layer.values[name]
        slope = np.empty_like(value)
        for index in np.ndindex(value.shape):
            up, down = value.copy(), value.copy()
            up[index] += step
            down[index] -= step
            slope[index] = (layer.loss(**{name: up}) - layer.loss(**{name: down})) / (up[index] - down[index])
        np.testing.assert_allclose(gradient, slope, rtol=bound, atol=bound, err_msg=name)


def by_autograd(layer):
    """The gradients by torch's autograd in float64, batch norm written out."""
    import torch

    leaves = {name: torch.from_numpy(v.astype(np.float64)).requires_grad_() for name, v in layer.values.items()}
    x, N, S = leaves["x"], layer.shape[0], layer.shape[2]
    present = torch.ones(N, 1, S) if layer.mask is None else torch.from_numpy(layer.mask)[:, None]
    present = present.double()
    if layer.options["frozen"]:
        mean, var = (torch.from_numpy(v)[:, None] for v in layer.running.values())
    else:
        mean = (x * present).sum((0, 2), keepdim=True) / present.sum()
        var = (((x - mean) * present) ** 2).sum((0, 2), keepdim=True) / present.sum()
    y = (x - mean) / torch.sqrt(var + EPS)
    if layer.options["affine"]:
        y = y * leaves["gamma"][:, None] + leaves["beta"][:, None]
    if layer.options["residual"]:
        y = y + leaves["residual"]
    if layer.options["relu"]:
        y = torch.relu(y)
    (y * present * torch.from_numpy(layer.dy.astype(np.float64))).sum().backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@pytest.mark.every_value
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=option_names)
def test_gradients_are_those_of_autograd(backend, options, dtype):
    """A few roundings of values of the gradient's size, in sums of a few dozen terms."""
    for seed in range(3):
        layer = Layer(options, dtype, seed)
        expected = by_autograd(layer)
        for name, gradient in layer.gradients().items():
            assert gradient.dtype == dtype
            bound = 16 * np.finfo(dtype).eps * max(1.0, np.abs(expected[name]).max())
            assert np.abs(gradient - expected[name]).max() <= bound, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(16, 5, 6, 7), (64, 5)])
def test_torch_agrees_in_float64(backend, shape, training):
    """torch's own batch norm: y, all gradients, and its momentum and unbiased running variance."""
    import torch

    rng = np.random.default_rng(0)
    x, dy = rng.normal(1.0, 2.0, shape), rng.normal(size=shape)
    gamma, beta, mean = rng.normal(size=(3, 5))
    var = rng.uniform(0.5, 2.0, 5)
    state = cubn.BatchNormState.from_arrays(
        gamma=gamma, beta=beta, running_mean=mean.copy(), running_var=var.copy(), eps=EPS, momentum=0.3
    )
    y, saved = (cubn.forward_train if training else cubn.forward_frozen)(x, state)
    grads = cubn.backward(dy, saved)
    leaves = [torch.from_numpy(v.copy()).requires_grad_() for v in (x, gamma, beta)]
    running = torch.from_numpy(mean), torch.from_numpy(var)
    theirs = torch.nn.functional.batch_norm(leaves[0], *running, *leaves[1:], training, 0.3, EPS)
    theirs.backward(torch.from_numpy(dy))
    pairs = [
        (y, theirs.detach()),
        *zip(grads[:3], (leaf.grad for leaf in leaves), strict=True),
        (state.running_mean, running[0]),
        (state.running_var, running[1]),
    ]
    for ours, other in pairs:
        other = other.numpy()
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-13 * max(1.0, np.abs(other).max()))
