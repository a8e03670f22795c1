"""Batch renormalisation: to the bit that of the contract, close to other formulas, and plain where it is told to be."""

import math
from dataclasses import replace

import numpy as np
import pytest

import cubn
from cubn import reference
from tests import oracle
from tests.conftest import BACKENDS
from tests.ops import arrays, cases
from tests.ops.cases import EPS, Case
from tests.ops.pairwise import covering, every_pair, others_full
from tests.ops.test_double_backward import DoubleCase

LIMITS = {"plain": (1, 0), "tight": (1.5, 0.25), "usual": (3.0, 5), "none": (math.inf, math.inf)}


class Renormalising(Case):
    """A case with renorm, which the oracle makes a plain one with another gamma and beta."""

    @property
    def limits(self):
        return LIMITS[self.row["renorm"]]

    def renormalised(self, stats):
        running = self.running_mean, self.running_var
        return oracle.renormalised(stats, *running, EPS, self.limits, **self.parameters)

    @property
    def expected_options(self):
        found = self.renormalised(oracle.batch_statistics(self.ncs, EPS, mask=self.flat_mask))
        return super().expected_options | {"gamma": found.gamma, "beta": found.beta}

    def expected_gradients(self, stats):
        found, given = super().expected_gradients(stats), self.renormalised(stats)
        with np.errstate(all="ignore"):
            dgamma = given.r * found.dgamma + given.d * found.dbeta
        of = {
            name: self.parameters[name].dtype if name in self.parameters else np.float32 for name in ("gamma", "beta")
        }
        return replace(found, dgamma=oracle.narrow(dgamma, of["gamma"]), dbeta=oracle.narrow(found.dbeta, of["beta"]))

    def arguments(self):
        x, options = super().arguments()
        return x, options | {"renorm": self.limits}


AXES = cases.AXES | {
    "operation": ["train"],
    "layout": ["nchw", "nhwc", "channels_last", "sliced", "axis0"],
    "threads": [2],
    "shape": ["2-D", "short", "single", "tiles"],
    "cut": ["whole"],
    "renorm": list(LIMITS),
    "backend": BACKENDS,
}
ROWS = [row for seed in range(2) for row in every_pair(AXES, cases.allowed, seed)]
FEW = covering(ROWS, 1)


@pytest.mark.parametrize(
    ("backend", "row"),
    others_full([(row.pop("backend"), row) for row in ROWS], FEW),
    indirect=["backend"],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_the_bits_are_those_of_the_contract(backend, row, eager_threads):
    """y, running statistics and gradients; any two values of any two options meet. By default, every value occurs."""
    cases.run(row, kind=Renormalising)


PLAIN = {"operation": "train", "dtype": "float32", "layout": "nchw", "threads": 2, "library": "numpy", "shape": "short"}
PLAIN |= {"mask": "none", "residual": False, "relu": False, "affine": "both", "parameters": "float32", "out": "fresh"}
PLAIN |= {"others": "alike", "momentum": 0.1, "cut": "whole", "renorm": "usual"}


def test_r_and_d_are_reported(backend):
    case = Renormalising(PLAIN | {"renorm": "tight"})
    x, options = case.arguments()
    _, saved = cubn.forward_train(x, case.state(), **options)
    expected = case.renormalised(case.statistics())
    arrays.assert_same(saved.r, expected.r, "r")
    arrays.assert_same(saved.d, expected.d, "d")
    assert {1 / 1.5, 1.5} & set(saved.r) and {0.25, -0.25} & set(saved.d), "no limit was met"
    del options["renorm"]
    _, saved = cubn.forward_train(x, case.state(), **options)
    assert saved.r is None and saved.d is None
    assert cubn.forward_frozen(x, case.state())[1].r is None


@pytest.mark.parametrize("relu", [False, True])
def test_limits_of_1_and_0_are_the_plain_bits(backend, relu):
    case = Case(PLAIN | {"relu": relu})
    x, options = case.arguments()
    found = []
    for renorm in (None, (1, 0)):
        state = case.state()
        y, saved = cubn.forward_train(x, state, renorm=renorm, **options)
        found.append((y, *cubn.backward(case.dy, saved)[:3], state.running_mean, state.running_var))
    for plain, renormalised in zip(*found, strict=True):
        arrays.assert_same(renormalised, plain)


def test_without_limits_y_is_that_of_the_running_statistics(backend):
    """In the limits of rounding: what batch renormalisation is for."""
    case = Renormalising(PLAIN | {"dtype": "float64", "parameters": "x", "renorm": "none"})
    x, options = case.arguments()
    expected = cubn.forward(x, case.state())
    y, _ = cubn.forward_train(x, case.state(), **options)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_are_those_of_finite_differences_with_r_and_d_constant(relu, axis):
    """Of a formula of its own, in float64."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(1.0, 2.0, (2, 6, 6))
    gamma, beta = rng.normal(1, 0.3, (2, 6))
    state = cubn.BatchNormState.from_arrays(
        gamma=gamma, beta=beta, running_mean=rng.normal(size=6), running_var=rng.uniform(1, 5, 6), channel_axis=axis
    )
    _, saved = cubn.forward_train(x, state, relu=relu, renorm=(1.2, 0.5), update=False)
    r, d = (np.expand_dims(v, 1 - axis) for v in (saved.r, saved.d))
    assert not np.isin(1.0, r) and not np.isin(0.0, d)

    def loss(x, gamma, beta):
        xhat = (x - x.mean(1 - axis, keepdims=True)) / np.sqrt(x.var(1 - axis, keepdims=True) + 1e-5)
        y = (xhat * r + d) * np.expand_dims(gamma, 1 - axis) + np.expand_dims(beta, 1 - axis)
        return (np.maximum(y, 0) if relu else y).ravel() @ dy.ravel()

    found = cubn.backward(dy, saved)
    given = (x, gamma, beta)
    for k, gradient in enumerate(found[:3]):
        for i in np.ndindex(given[k].shape):
            step = np.zeros_like(given[k])
            step[i] = 1e-6
            ahead, behind = (loss(*given[:k], given[k] + s, *given[k + 1 :]) for s in (step, -step))
            assert gradient[i] == pytest.approx((ahead - behind) / 2e-6, abs=2e-7)


@pytest.mark.parametrize("frozen_at", ["mean", "var", "negative", "zero"])
def test_channels_whose_running_statistics_cannot_be_used_are_plain(backend, frozen_at):
    case = Case(PLAIN)
    match frozen_at:
        case "mean":
            case.running_mean[2] = np.nan
        case "var":
            case.running_var[2] = np.inf
        case "negative":
            case.running_var[2] = -1
        case "zero":
            case.running_var[2] = np.float32(-EPS)
    eps = float(-case.running_var[2]) if frozen_at == "zero" else EPS
    state, plain = (
        cubn.BatchNormState.from_arrays(
            **case.parameters,
            running_mean=case.running_mean.copy(),
            running_var=case.running_var.copy(),
            eps=eps,
            check=False,
        )
        for _ in range(2)
    )
    y, saved = cubn.forward_train(case.x, state, renorm=(3, 5))
    assert saved.r[2] == 1 and saved.d[2] == 0
    assert (np.delete(saved.r, 2) != 1).all()
    expected, _ = cubn.forward_train(case.x, plain)
    arrays.assert_same(y[:, 2], expected[:, 2])
    arrays.assert_same(state.running_mean, plain.running_mean)


def test_channels_of_several_blocks(backend, monkeypatch):
    """A block of CUDA threads has 256."""
    monkeypatch.setitem(cases.SHAPES, "wide", (3, 600, 1))
    cases.run(PLAIN | {"shape": "wide", "renorm": "tight"}, kind=Renormalising)


def test_values_that_are_not_finite_are_numbers_like_others(backend):
    for dtype in ("float16", "float32"):
        case = Renormalising(PLAIN | {"dtype": dtype, "relu": True, "residual": True})
        case.x = arrays.normal(np.random.default_rng(1), case.x.shape, dtype, wild=0.002)
        case.dy = arrays.normal(np.random.default_rng(2), case.x.shape, dtype, wild=0.002)
        cases._train(case)


def test_what_follows_a_renormalised_forward_does_not_change_its_backward(backend):
    """Nor does a plain call with arrays of the same layouts take it for one of its own."""
    case = Renormalising(PLAIN | {"relu": True})
    x, options = case.arguments()
    state = case.state()
    _, saved = cubn.forward_train(x, state, **options)
    first = cubn.backward(case.dy, saved)
    del options["renorm"]
    _, plain = cubn.forward_train(x, state, **options)
    of_plain = [cubn.backward(case.dy, plain) for _ in range(3)]
    again = cubn.backward(case.dy, saved)
    for got, expected in zip(again[:3], first[:3], strict=True):
        arrays.assert_same(got, expected)
    arrays.assert_same(again.dgamma, case.expected_gradients(case.statistics()).dgamma)
    for got in of_plain[1:]:
        arrays.assert_same(got.dgamma, of_plain[0].dgamma)
    assert not np.array_equal(first.dgamma, of_plain[0].dgamma)


def test_without_an_update_the_state_is_only_read():
    state = cubn.BatchNormState(3)
    before = state.to_dict()
    x = np.random.default_rng(0).normal(4, 2, (8, 3)).astype(np.float32)
    y, _ = cubn.forward_train(x, state, renorm=(3, 5), update=False)
    np.testing.assert_equal(state.to_dict(), before)
    expected, _ = cubn.forward_train(x, state, renorm=(3, 5))
    arrays.assert_same(y, expected)
    assert (state.tracked == 1).all()


def test_running_statistics_of_16_bits_are_read():
    running = np.full(3, 0.5, np.float16)
    state = cubn.BatchNormState.from_arrays(running_mean=running, running_var=running.copy())
    x = np.random.default_rng(0).normal(4, 2, (8, 3)).astype(np.float32)
    _, saved = cubn.forward_train(x, state, renorm=(math.inf, math.inf), update=False)
    np.testing.assert_allclose(saved.d, (x.mean(0) - 0.5) / math.sqrt(0.5 + 1e-5), rtol=1e-6)


class RenormalisingTwice(DoubleCase, Renormalising):
    """The gradients of a renormalised backward: those of a plain one, by ddgamma * r and ddbeta + ddgamma * d."""

    def wanted(self, stats):
        given = self.renormalised(stats)
        u, w = (oracle.widen(a).astype(np.float64) for a in (self.ddgamma, self.ddbeta))
        u, w = (v if name in self.given else np.zeros(self.C) for name, v in (("ddgamma", u), ("ddbeta", w)))
        ddgamma, ddbeta, given_before = self.ddgamma, self.ddbeta, self.given
        self.ddgamma, self.ddbeta, self.given = u * given.r, w + u * given.d, self.given | {"ddgamma", "ddbeta"}
        found = super().wanted(stats)
        self.ddgamma, self.ddbeta, self.given = ddgamma, ddbeta, given_before
        dtype = self.parameters["gamma"].dtype if "gamma" in self.parameters else np.float32
        return replace(found, dgamma=oracle.narrow(found.dgamma * given.r, dtype))


@pytest.mark.every_pair
@pytest.mark.parametrize("affine", ["both", "none", "gamma", "beta"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_bits_of_a_double_backward(backend, dtype, residual, relu, affine):
    RenormalisingTwice(**PLAIN | {"dtype": dtype, "residual": residual, "relu": relu, "affine": affine}).check()


def test_a_double_backward_is_that_of_automatic_differentiation():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    x, dy, ddx = rng.normal(size=(3, 7, 4))
    gamma, beta, ddgamma, ddbeta = rng.normal(size=(4, 4))
    running = {"running_mean": rng.normal(size=4), "running_var": rng.uniform(1, 5, 4)}
    state = cubn.BatchNormState.from_arrays(gamma=gamma, beta=beta, **running)
    _, saved = cubn.forward_train(x, state, renorm=(1.3, 0.4), update=False)
    found = cubn.double_backward(ddx, ddgamma, ddbeta, dy, saved)
    r, d = torch.from_numpy(saved.r), torch.from_numpy(saved.d)
    X, G, B, DY = (torch.from_numpy(a).clone().requires_grad_() for a in (x, gamma, beta, dy))
    xhat = (X - X.mean(0)) / torch.sqrt(X.var(0, unbiased=False) + 1e-5)
    first = torch.autograd.grad((xhat * r + d) * G + B, (X, G, B), DY, create_graph=True)
    given = tuple(map(torch.from_numpy, (ddx, ddgamma, ddbeta)))
    for got, expected in zip(found, torch.autograd.grad(first, (DY, X, G), given), strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-11)


def test_the_slow_statement_of_the_contract():
    """The reference's own tree and formulas, value by value."""
    rng = np.random.default_rng(8)
    x, dy = rng.normal(2, 3, (2, 5, 3, 4)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.2, (2, 3)).astype(np.float32)
    mean, var = rng.normal(size=3).astype(np.float32), rng.uniform(0.5, 9, 3).astype(np.float32)
    state = cubn.BatchNormState.from_arrays(
        gamma=gamma, beta=beta, running_mean=mean.copy(), running_var=var.copy(), eps=EPS
    )
    y, saved = cubn.forward_train(x, state, renorm=(2, 1))
    found = cubn.backward(dy, saved)

    node = reference.tree([reference.sample_moments(sample) for sample in x], reference.merge)
    centre, _, invstd = reference.finalize(node, EPS)
    old_mean, old_var = mean.astype(np.float64), var.astype(np.float64)
    r, d = reference.renormalisation(centre, invstd, old_mean, old_var, 1 / np.sqrt(old_var + EPS), 2, 1)
    affine = reference.renormalised_affine(gamma, beta, r, d)
    arrays.assert_same(y, np.stack([reference.output(sample, centre, invstd, *affine) for sample in x]), "y")
    sums = [reference.sample_sums(g, g * reference.centre(v, centre)) for g, v in zip(dy, x, strict=True)]
    count, first, second = reference.tree(sums, reference.add)
    dx = [
        reference.input_gradient(g, v, centre, invstd, affine[0], count, first, second)
        for g, v in zip(dy, x, strict=True)
    ]
    arrays.assert_same(found.dx, np.stack(dx), "dx")
    dgamma = reference.renormalised_gamma_gradient(invstd, first, second, r, d)
    arrays.assert_same(found.dgamma, dgamma.astype(np.float32), "dgamma")
    arrays.assert_same(found.dbeta, first.astype(np.float32), "dbeta")
