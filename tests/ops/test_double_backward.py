"""The gradients of a backward: to the bit those of the contract, and close to those of automatic differentiation."""

import itertools

import numpy as np
import pytest

import cubn
from tests import oracle
from tests.conftest import BACKENDS
from tests.ops import arrays, cases
from tests.ops.cases import EPS, Case
from tests.ops.pairwise import every_pair, others_full, whole_product

OPTIONS = {"out": "fresh", "momentum": 0.1, "cut": "whole", "threads": 2}
ALL = ("ddx", "ddgamma", "ddbeta", "ddresidual")


class DoubleCase(Case):
    """A case with gradients by what its backward returns; those that are not `given` are None."""

    def __init__(self, given=ALL, seed=0, **row):
        super().__init__(OPTIONS | {"library": "numpy"} | row, seed)
        rng = np.random.default_rng(seed + 1)
        dtype = row["dtype"]
        self.ddx, self.ddresidual = (arrays.normal(rng, self.x.shape, dtype) for _ in range(2))
        self.ddgamma = arrays.normal(rng, self.C, "float64")
        self.ddbeta = arrays.normal(rng, self.C, "float16")
        present = {"ddgamma": "gamma" in self.parameters, "ddbeta": "beta" in self.parameters}
        present |= {"ddx": True, "ddresidual": self.residual is not None}
        self.given = {name for name in given if present[name]}

    @property
    def frozen(self):
        return self.row["operation"] == "frozen"

    def wanted(self, stats):
        """By the oracle, (N, C, S)."""
        u, w = (getattr(self, n) if n in self.given else np.zeros(self.C) for n in ("ddgamma", "ddbeta"))
        v, r = (getattr(self, n) if n in self.given else np.zeros_like(self.x) for n in ("ddx", "ddresidual"))
        v, r, dy = (oracle.as_ncs(a, self.axis) for a in (v, r, self.dy))
        u, w = (oracle.widen(a).astype(np.float64) for a in (u, w))
        options = {"ddresidual": r, "frozen": self.frozen, **self.expected_options}
        return oracle.double_backward(v, u, w, dy, self.ncs, stats, **options)

    def found(self):
        """By cubn."""
        x, options = self.arguments()
        forward = cubn.forward_frozen if self.frozen else cubn.forward_train
        _, saved = forward(x, self.state(), **options)
        given = dict.fromkeys(ALL) | {name: self.carried(name) for name in self.given}
        dy = self.beside(self.dy)
        return cubn.double_backward(*(given[name] for name in ALL[:3]), dy, saved, ddresidual=given["ddresidual"])

    def carried(self, name):
        return (self.carry if name in ("ddgamma", "ddbeta") else self.beside)(getattr(self, name))

    def check(self):
        cubn.set_num_threads(self.row["threads"])
        found, wanted = self.found(), self.wanted(self.statistics())
        for name in ("ddy", "dx"):
            got = arrays.store_of(getattr(found, name))
            assert arrays.library_of(getattr(found, name)) == self.row["library"]
            assert got.shape == self.x.shape
            arrays.assert_same(oracle.as_ncs(got, self.axis), getattr(wanted, name), name)
        if "gamma" in self.parameters:
            arrays.assert_same(arrays.store_of(found.dgamma), wanted.dgamma, "dgamma")
        else:
            assert found.dgamma is None


def row(**options):
    """A case, plain but for these options."""
    plain = {"operation": "train", "dtype": "float32", "layout": "nchw", "shape": "short", "mask": "none"}
    plain |= {"residual": False, "relu": False, "affine": "both", "parameters": "float32", "others": "alike"}
    return plain | options


AXES = cases.AXES | {
    "operation": ["train", "frozen"],
    "layout": ["nchw", "nhwc", "channels_last", "sliced", "axis0"],
    "threads": [2],
    "shape": ["2-D", "short", "single", "tiles"],
    "mask": ["none", "full"],
    "out": ["fresh"],
    "momentum": [0.1],
    "cut": ["whole"],
    "backend": BACKENDS,
}
SEEDED = [(seed, row) for seed in range(12) for row in every_pair(AXES, cases.allowed, seed)]
ROWS = others_full(
    [(row.pop("backend"), row) for _, row in SEEDED], [i for i, (seed, _) in enumerate(SEEDED) if not seed]
)
PRODUCT = ["operation", "dtype", "layout", "shape", "mask", "residual", "relu", "others"]


@pytest.mark.parametrize(
    ("backend", "row"),
    ROWS,
    indirect=["backend"],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_the_bits_are_those_of_the_contract(backend, row, eager_threads):
    """Any two values of any two options meet, with -m full several times."""
    DoubleCase(**row).check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_the_bits_of_the_whole_product_are_those_of_the_contract(backend, dtype, eager_threads):
    for row in whole_product(AXES | {"dtype": [dtype]}, PRODUCT, cases.allowed):
        del row["backend"]
        try:
            DoubleCase(**row).check()
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from error


@pytest.mark.parametrize("threads", [1, 2, 3, 11])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_number_of_threads_does_not_matter(threads, layout, eager_threads):
    DoubleCase(**row(threads=threads, layout=layout, shape="tiles", relu=True)).check()


@pytest.mark.parametrize("operation", ["train", "frozen"])
@pytest.mark.parametrize("given", [given for n in range(4) for given in itertools.combinations(ALL, n)], ids="-".join)
def test_what_is_none_counts_as_zeros(given, operation):
    DoubleCase(given=given, **row(operation=operation, residual=True, relu=True)).check()


@pytest.mark.parametrize("shape", ["2-D", "single", "vectors"])
@pytest.mark.parametrize("mask", ["none", "full"])
def test_a_ddx_of_none_has_the_layout_of_zeros(backend, shape, mask):
    """In the memory of one number."""
    DoubleCase(given=["ddgamma"], **row(shape=shape, mask=mask)).check()


@pytest.mark.every_pair
@pytest.mark.parametrize("operation", ["train", "frozen"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_infinities_and_nan_are_numbers_like_others(backend, dtype, relu, operation):
    case = DoubleCase(**row(dtype=dtype, relu=relu, operation=operation, residual=relu))
    rng = np.random.default_rng(9)
    for name in ("x", "dy", "ddx"):
        setattr(case, name, arrays.normal(rng, case.x.shape, dtype, wild=0.002))
    case.ddgamma[2], case.ddbeta[3] = np.inf, np.nan
    case.check()


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_given_stays_and_can_be_used_again(relu):
    x, dy, ddx = np.random.default_rng(0).standard_normal((3, 6, 4, 5))
    _, saved = cubn.forward_train(x, cubn.BatchNormState(4, dtype="float64"), relu=relu)
    before = [a.copy() for a in (x, dy, ddx)]
    first, second = (cubn.double_backward(ddx, None, None, dy, saved) for _ in range(2))
    for was, now in zip(before + list(first), [x, dy, ddx, *second], strict=True):
        arrays.assert_same(now, was)


@pytest.mark.every_pair
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("apart", [None, "dy", "ddx", "ddresidual"])
@pytest.mark.parametrize("shape", [(3, 16, 20, 20), (20, 6, 3, 3)])
def test_channels_of_one_array_may_be_apart(backend, shape, apart, relu):
    """As every second one of a larger array, where those of the others lie side by side."""
    rng, C = np.random.default_rng(4), shape[1]
    x, *others = (arrays.normal(rng, shape) for _ in range(5))
    given = dict(zip(("residual", "dy", "ddx", "ddresidual"), others, strict=True))
    if apart:
        given[apart] = np.repeat(given[apart], 2, axis=1)[:, ::2]
        assert given[apart].strides[1] == 2 * x.strides[1]
    state = cubn.BatchNormState(C, eps=EPS)
    _, saved = cubn.forward_train(x, state, residual=given["residual"], relu=relu)
    found = cubn.double_backward(given["ddx"], None, None, given["dy"], saved, ddresidual=given["ddresidual"])
    flat = {name: oracle.as_ncs(array) for name, array in given.items()}
    options = {"ddresidual": flat["ddresidual"], "residual": flat["residual"], "relu": relu}
    data, zeros = oracle.as_ncs(x), np.zeros(C)
    stats = oracle.batch_statistics(data, EPS)
    wanted = oracle.double_backward(flat["ddx"], zeros, zeros, flat["dy"], data, stats, **options)
    for name in ("ddy", "dx"):
        arrays.assert_same(oracle.as_ncs(getattr(found, name)), getattr(wanted, name), name)


def test_of_an_empty_batch(backend):
    x, vector = np.zeros((0, 3, 4), np.float32), np.ones(3)
    _, saved = cubn.forward_frozen(x, cubn.BatchNormState(3))
    found = cubn.double_backward(x, vector, vector, x, saved)
    assert found.ddy.shape == found.dx.shape == x.shape
    arrays.assert_same(found.dgamma, np.zeros(3, np.float32))


# --- against other formulas -------------------------------------------------------------------------------------------


def by_torch(x, dy, ddx, gamma, beta, ddgamma, ddbeta, *, mean=None, var=None, residual=None, ddresidual=None, relu):
    """ddy, dx and dgamma by automatic differentiation of a plain formula, in float64."""
    import torch

    def tensor(values):
        return None if values is None else torch.tensor(np.asarray(values, np.float64), requires_grad=True)

    x, dy, gamma, residual = map(tensor, (x, dy, gamma, residual))
    mean, var = (x.mean((0, 2)), x.var((0, 2), correction=0)) if mean is None else map(torch.tensor, (mean, var))
    mean, invstd, beta = mean[:, None], (var + EPS)[:, None] ** -0.5, tensor(beta)
    y = (x - mean) * invstd * gamma[:, None] + beta[:, None]
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    read = [x, gamma, beta] if residual is None else [x, gamma, beta, residual]
    first = torch.autograd.grad((y * dy).sum(), read, create_graph=True)
    by = (ddx, ddgamma, ddbeta) if residual is None else (ddx, ddgamma, ddbeta, ddresidual)
    scalar = sum((torch.tensor(np.asarray(a, np.float64)) * b).sum() for a, b in zip(by, first, strict=True))
    found = torch.autograd.grad(scalar, [dy, x, gamma], materialize_grads=True)
    return [each.numpy() for each in found]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("dtype", "centre"), [("float64", 0.0), ("float32", 0.0), ("float32", 1e3)])
def test_gradients_are_those_of_automatic_differentiation(dtype, centre, skip, relu, frozen):
    """Errors in units in the last place of the largest value of a channel."""
    rng = np.random.default_rng(3)
    shape, C = (16, 5, 49), 5
    x = rng.normal(centre, 1.0, shape).astype(dtype)
    dy, ddx, residual, ddresidual = rng.normal(0.2, 1.0, (4, *shape)).astype(dtype)
    gamma, beta, ddgamma, ddbeta, mean = rng.standard_normal((5, C))
    given = {"mean": mean + centre, "var": rng.uniform(0.5, 2.0, C)} if frozen else {}
    state = cubn.BatchNormState.from_arrays(
        gamma=gamma, beta=beta, eps=EPS, **{f"running_{name}": value for name, value in given.items()}
    )
    skipped = {"residual": residual} if skip else {}
    _, saved = (cubn.forward_frozen if frozen else cubn.forward_train)(x, state, relu=relu, **skipped)
    also = {"ddresidual": ddresidual} if skip else {}
    found = cubn.double_backward(ddx, ddgamma, ddbeta, dy, saved, **also)
    wanted = by_torch(x, dy, ddx, gamma, beta, ddgamma, ddbeta, relu=relu, **given, **skipped, **also)
    eps = np.finfo(dtype).eps
    for name, got, want in zip(found._fields, found, wanted, strict=True):
        largest = abs(want).max(axis=(0, 2), keepdims=True) if want.ndim == 3 else abs(want).max()
        assert (abs(got - want) <= 64 * eps * largest).all(), name


# --- bad input --------------------------------------------------------------------------------------------------------

X = np.ones((4, 3, 2), np.float32)
Y = X + np.arange(2, dtype=np.float32)
V = np.ones(3, np.float32)
FACTS = "dtype=float32, device=cpu"


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (
            {"ddx": X[:2]},
            ValueError,
            f"ddx must have x's shape (4, 3, 2); got a numpy array (shape=(2, 3, 2), {FACTS}).",
        ),
        ({"ddx": X.astype(np.float64)}, TypeError, "ddx must have x's dtype float32; got a numpy array"),
        ({"ddx": 0.0}, TypeError, "ddx must be an array with __dlpack__; got a float"),
        ({"dy": None}, TypeError, "dy must be an array with __dlpack__; got a NoneType"),
        ({"dy": X[..., :1]}, ValueError, "dy must have x's shape (4, 3, 2)"),
        ({"ddgamma": X}, ValueError, "ddgamma must have shape (3,), one value per channel"),
        ({"ddbeta": np.ones(4)}, ValueError, "ddbeta must have shape (3,), one value per channel"),
        ({"ddgamma": np.ones(3, np.int64)}, TypeError, "ddgamma must have dtype float16"),
        (
            {"ddresidual": X},
            ValueError,
            "ddresidual must be None, as the residual of the forward was; got a numpy array",
        ),
        ({"parameter_gradients": "both"}, ValueError, "parameter_gradients must be 'local' or 'global'; got 'both'."),
        ({"saved": X}, TypeError, "saved must be a Saved; got ndarray."),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changed, error, text):
    _, saved = cubn.forward_train(Y, cubn.BatchNormState(3))
    given = {"ddx": X, "ddgamma": V, "ddbeta": V, "dy": X, "saved": saved} | changed
    with pytest.raises(error) as caught:
        cubn.double_backward(**given)
    assert str(caught.value).startswith(f"double_backward: {text}")


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_there_is_no_gradient_by_what_was_not_there(name):
    state = cubn.BatchNormState.from_arrays(**{{"gamma": "beta", "beta": "gamma"}[name]: V})
    _, saved = cubn.forward_train(Y, state)
    given = {"ddgamma": None, "ddbeta": None} | {f"dd{name}": V}
    with pytest.raises(ValueError, match=rf"dd{name} must be None, as the forward's {name} was; got a numpy array"):
        cubn.double_backward(X, dy=X, saved=saved, **given)


def test_x_must_be_what_it_was():
    x = Y.copy()
    _, saved = cubn.forward_train(x, cubn.BatchNormState(3), out=x)
    with pytest.raises(ValueError, match=r"double_backward: x must be kept until backward, but y was written over it"):
        cubn.double_backward(X, None, None, X, saved)
