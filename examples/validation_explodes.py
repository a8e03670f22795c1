"""Validation explodes though training is fine: one bad batch has poisoned the running statistics.

The usual update makes running_mean inf and running_var NaN for ever after a single overflow. cubn leaves a channel
whose batch is not finite as it was, counts it, and keeps tiny variances as the subnormal numbers they are. Running
statistics that were poisoned elsewhere are healed by the next good batch, channel by channel. Those that no longer
describe the data are replaced by those of a data set.
"""

from functools import reduce

import numpy as np

import cubn


def main():
    rng = np.random.default_rng(0)
    state = cubn.BatchNormState(4)
    for _ in range(100):
        cubn.forward_train(rng.standard_normal((8, 4, 6, 6), dtype=np.float32), state)
    before = state.copy()

    x = rng.standard_normal((8, 4, 6, 6), dtype=np.float32)
    x[3, 2, 0, 0] = np.inf  # an overflow in channel 2
    cubn.forward_train(x, state)
    print("skipped batches per channel:", state.skipped)
    assert state.skipped.tolist() == [0, 0, 1, 0]
    assert state.running_mean[2] == before.running_mean[2] and state.running_var[2] == before.running_var[2]
    assert np.isfinite(state.running_mean).all() and np.isfinite(state.running_var).all()
    assert (state.running_mean != before.running_mean).tolist() == [True, True, False, True]

    constant = np.zeros((8, 4, 6, 6), np.float32)  # dead channels: the running variance sinks
    for _ in range(900):
        cubn.forward_train(constant, state)
    print("running variance of dead channels:", state.running_var)
    assert (state.running_var >= 0).all() and (state.running_var < 1e-38).all()
    assert np.isfinite(cubn.forward(x[:3], state)).all()
    print("inference stays finite")

    state.running_mean[1], state.running_var[1] = np.inf, np.nan  # as other libraries leave them
    assert np.isnan(cubn.forward(x[:3], state)[:, 1]).all()
    good = rng.standard_normal((8, 4, 6, 6), dtype=np.float32)
    cubn.forward_train(good, state)
    assert state.running_mean[1] == np.float32(cubn.moments(good).mean[1])
    assert np.isfinite(cubn.forward(x[:3], state)).all()
    print("one good batch heals a poisoned channel")

    state.running_mean[:], state.running_var[:] = np.nan, np.inf
    batches = np.split(rng.normal(4, 2, (32, 4, 6, 6)).astype(np.float32), 4)  # data as it is now
    moments = reduce(cubn.Moments.merge, (cubn.moments(batch, start=8 * i) for i, batch in enumerate(batches)))
    state.momentum = 1  # all weight on the new value
    cubn.update(state, moments)
    assert np.array_equal(state.running_mean, moments.mean.astype(np.float32))
    assert np.array_equal(state.running_var, moments.var_unbiased().astype(np.float32))
    y = np.concatenate([cubn.forward(batch, state) for batch in batches])
    assert np.abs(y.mean((0, 2, 3))).max() < 1e-3 and np.abs(y.var((0, 2, 3)) - 1).max() < 1e-2
    print("recalibrated: running mean", state.running_mean, "and variance", state.running_var)


if __name__ == "__main__":
    main()
