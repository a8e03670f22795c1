"""I wrote my own batch norm: from building blocks that run at native speed and update their state in place.

A batch norm with one state per data domain, trained with gradient accumulation: every micro-batch is normalised with
its own statistics, but the running statistics are updated once, with the moments of all micro-batches merged, as if
they had been one batch.
"""

from functools import reduce

import numpy as np

import cubn


class DomainBatchNorm:
    """gamma and beta shared, running statistics per domain."""

    def __init__(self, num_features, domains):
        self.gamma, self.beta = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.states = {
            domain: cubn.BatchNormState.from_arrays(
                gamma=self.gamma,
                beta=self.beta,
                running_mean=np.zeros(num_features, np.float32),
                running_var=np.ones(num_features, np.float32),
            )
            for domain in domains
        }

    def forward_train(self, micro_batches, domain):
        """(y, saved) of each micro-batch; the running statistics move once."""
        results, parts, start = [], [], 0
        for x in micro_batches:
            results.append(cubn.forward_train(x, self.states[domain], relu=True, update=False))
            parts.append(cubn.moments(x, start=start))
            start += len(x)
        cubn.update(self.states[domain], reduce(cubn.Moments.merge, parts))
        return results

    def forward(self, x, domain):
        return cubn.forward(x, self.states[domain], relu=True)


def main():
    rng = np.random.default_rng(0)
    layer = DomainBatchNorm(16, ("day", "night"))
    for _ in range(50):
        for domain, level in (("day", 3.0), ("night", -1.0)):
            x = (rng.standard_normal((12, 16, 8, 8)) + level).astype(np.float32)
            results = layer.forward_train((x[:5], x[5:6], x[6:]), domain)
            gradients = [cubn.backward(np.ones_like(y), saved) for y, saved in results]
            layer.gamma -= 0.01 * sum(g.dgamma for g in gradients)
            layer.beta -= 0.01 * sum(g.dbeta for g in gradients)
    for domain, state in layer.states.items():
        print(f"{domain:<5}: running mean {state.running_mean.mean():+.2f}, variance {state.running_var.mean():.2f}")
    assert abs(layer.states["day"].running_mean.mean() - 3) < 0.1
    assert abs(layer.states["night"].running_mean.mean() + 1) < 0.1

    # The same, with the whole batch at hand: the same bits.
    whole, cut = cubn.BatchNormState(16), cubn.BatchNormState(16)
    y, _ = cubn.forward_train(x, whole)
    moments = cubn.moments(x[:5]).merge(cubn.moments(x[5:], start=5))
    cubn.update(cut, moments)
    assert np.array_equal(whole.running_mean, cut.running_mean)
    assert np.array_equal(whole.running_var, cut.running_var)
    assert np.array_equal(y, cubn.normalize(x, moments, gamma=cut.gamma, beta=cut.beta))
    print("moments of parts, merged, then normalize and update: the bits of forward_train")


if __name__ == "__main__":
    main()
