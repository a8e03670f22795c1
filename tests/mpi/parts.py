"""A batch and its parts: what one process makes of the whole, and a rank of its samples."""

from itertools import accumulate, pairwise

import numpy as np

import cubn
from tests.ops import arrays

CUTS = {
    "32": [32],
    "16-16": [16, 16],
    "20-12": [20, 12],
    "31-1": [31, 1],
    "0-5-0-27": [0, 5, 0, 27],
    "thirds": [11, 11, 10],
    "2x16": [2] * 16,
    "4x8": [4] * 8,
    "1x32": [1] * 32,
}
LAYOUTS = ["nchw", "nhwc", "sliced", "axis0", "permuted"]
C, POSITIONS = 6, (5, 7)


class Batch:
    """Values (N, C, *positions), a gradient, a residual and a mask; a rank's part of them in a layout of its own."""

    def __init__(self, dtype="float32", *, masked=False, N=32, positions=POSITIONS, seed=0):
        rng = np.random.default_rng(seed)
        shape = (N, C, *positions)
        self.dtype = dtype
        self.x = arrays.normal(rng, shape, dtype, centre=3.0, scale=2.0)
        self.dy, self.residual = (arrays.normal(rng, shape, dtype) for _ in range(2))
        self.gamma, self.beta = rng.normal(1, 0.5, (2, C)).astype(np.float32)
        self.mask = rng.random((N, *positions)) < 0.7 if masked else None

    def state(self, axis=1, momentum=0.1):
        state = cubn.BatchNormState(C, momentum=momentum, channel_axis=axis)
        state.gamma[...], state.beta[...] = self.gamma, self.beta
        return state

    def range(self, cut, rank):
        return list(pairwise(accumulate(cut, initial=0)))[rank]

    def part(self, lo, hi, layout="nchw"):
        """(x, dy, residual, mask, channel axis) of samples [lo, hi)."""
        laid = [arrays.lay_out(store[lo:hi], layout) for store in (self.x, self.dy, self.residual)]
        x, dy, residual = (arrays.carry(store, "numpy") for store, _ in laid)
        return x, dy, residual, None if self.mask is None else self.mask[lo:hi], laid[0][1]


def step(
    batch,
    lo,
    hi,
    layout="nchw",
    *,
    residual=True,
    relu=True,
    frozen=False,
    momentum=0.1,
    gradients="global",
    renorm=None,
    **comm,
):
    """Forward, backward and moments of samples [lo, hi), as stores in the order (N, C, ...)."""
    x, dy, skip, mask, axis = batch.part(lo, hi, layout)
    state = batch.state(axis, momentum)
    forward = cubn.forward_frozen if frozen else cubn.forward_train
    limits = {"renorm": renorm} if renorm else {}
    y, saved = forward(x, state, mask=mask, residual=skip if residual else None, relu=relu, **limits, **comm)
    grads = cubn.backward(dy, saved, parameter_gradients=gradients)
    moments = cubn.moments(x, channel_axis=axis, mask=mask, **comm)

    def in_order(array):
        return None if array is None else np.moveaxis(arrays.store_of(array), axis, 1)

    return {
        "samples": {"y": in_order(y), "dx": in_order(grads.dx), "dresidual": in_order(grads.dresidual)},
        "parameters": {"dgamma": grads.dgamma, "dbeta": grads.dbeta},
        "channels": {
            "running_mean": state.running_mean,
            "running_var": state.running_var,
            "tracked": state.tracked,
            "skipped": state.skipped,
            "count": np.asarray(saved.count),
            "mean": np.array(saved.mean),
            "var": np.array(saved.var),
            "moments.count": moments.count,
            "moments.mean": moments.mean,
            "moments.m2": moments.m2,
            "moments.range": np.array([moments.start, moments.stop]),
            **({"r": np.array(saved.r), "d": np.array(saved.d)} if renorm else {}),
        },
    }


def assert_one_answer(parts, whole, *, parameters=True):
    """The ranks' results are to the bit those of one process with the whole batch."""
    for name, expected in whole["samples"].items():
        if expected is not None:
            arrays.assert_same(np.concatenate([part["samples"][name] for part in parts]), expected, name)
    for rank, part in enumerate(parts):
        kinds = ["channels", "parameters"] if parameters else ["channels"]
        for name, expected in (item for kind in kinds for item in whole[kind].items()):
            got = part["channels"].get(name, part["parameters"].get(name))
            arrays.assert_same(got, expected, f"{name} on rank {rank}")
