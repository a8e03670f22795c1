"""A training step and its gradient, held to the oracle: run for a processor that NUMBA_CPU_NAME names.

python -m tests.ops.on_target DTYPE LAYOUT...
"""

import sys

import numpy as np

import cubn
from tests import oracle
from tests.ops import arrays

EPS, MOMENTUM = 1e-5, 0.3
N, C, S = 3, 21, 40


def check(dtype, layout):
    rng = np.random.default_rng(0)
    x, dy = (arrays.normal(rng, (N, C, S), dtype, wild=wild) for wild in (0.01, 0.0))
    gamma, beta = arrays.normal(rng, (2, C), dtype, centre=1.0)
    placed, axis = arrays.lay_out(x, layout)
    running = np.zeros(C, np.float32), np.ones(C, np.float32)
    state = cubn.BatchNormState.from_arrays(
        gamma=arrays.carry(gamma.copy(), "numpy"),
        beta=arrays.carry(beta.copy(), "numpy"),
        running_mean=running[0].copy(),
        running_var=running[1].copy(),
        momentum=MOMENTUM,
        eps=EPS,
        channel_axis=axis,
    )
    y, saved = cubn.forward_train(arrays.carry(placed, "numpy"), state, relu=True)
    gradients = cubn.backward(arrays.carry(arrays.lay_out(dy, layout)[0], "numpy"), saved)
    stats = oracle.batch_statistics(x, EPS)
    expected = oracle.backward(dy, x, stats, gamma, beta, relu=True)
    after = oracle.update(oracle.State(*running, *np.zeros((2, C), np.int64)), stats, MOMENTUM)
    results = {
        "y": (np.moveaxis(arrays.store_of(y), axis, 1), oracle.normalize(x, stats, gamma, beta, relu=True)),
        "dx": (np.moveaxis(arrays.store_of(gradients.dx), axis, 1), expected.dx),
        "dgamma": (arrays.store_of(gradients.dgamma), expected.dgamma),
        "dbeta": (arrays.store_of(gradients.dbeta), expected.dbeta),
        "running_mean": (state.running_mean, after.mean),
        "running_var": (state.running_var, after.var),
    }
    for name, (got, wanted) in results.items():
        arrays.assert_same(got, wanted, f"{name} of {dtype} {layout}")


if __name__ == "__main__":
    for layout in sys.argv[2:]:
        check(sys.argv[1], layout)
