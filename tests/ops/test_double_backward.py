"""The gradients of a backward: to the bit those of the contract, and close to those of automatic differentiation."""

import itertools

import numpy as np
import pytest

import cubn
from cubn import reference
from tests import oracle
from tests.ops import arrays
from tests.ops.cases import EPS, Case

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
        given = {name: self.carry(getattr(self, name)) for name in self.given.intersection(("ddgamma", "ddbeta"))}
        given |= {name: self.beside(getattr(self, name)) for name in self.given.intersection(("ddx", "ddresidual"))}
        return cubn.double_backward(
            given.pop("ddx", None),
            given.pop("ddgamma", None),
            given.pop("ddbeta", None),
            self.beside(self.dy),
            saved,
            **given,
        )

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
    plain = {"operation": "train", "dtype": "float32", "layout": "nchw", "shape": "short", "mask": "none"}
    plain |= {"residual": False, "relu": False, "affine": "both", "parameters": "float32", "others": "alike"}
    return plain | options


@pytest.mark.every_pair
@pytest.mark.parametrize("operation", ["train", "frozen"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("mask", ["none", "full"])
@pytest.mark.parametrize("shape", ["2-D", "short", "single", "tiles"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_the_bits_are_those_of_the_contract(backend, dtype, layout, shape, mask, residual, relu, operation):
    DoubleCase(**row(**{k: v for k, v in locals().items() if k != "backend"})).check()
