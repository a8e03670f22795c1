"""I wrote my own batch norm: its running statistics are lost, its memory is four times the input.

The usual one, in torch: written by its formulas, it keeps several arrays of the input's size for the backward. On
devices it is replicated for every step, as `torch.nn.DataParallel` does; the replicas' running statistics are updated
and thrown away with them, so that zeros and ones are what comes out.

Then the same from cubn's building blocks: a state per domain, updated in place, whatever thread does it; every
micro-batch is normalised with its own statistics, and the running ones are updated once, with the moments of all of
them merged, as if they had been one batch.

    python examples/own_batch_norm.py --figure docs/figures/own_batch_norm.png
"""

import argparse
import copy
from functools import reduce

import numpy as np
import torch

import cubn
import cubn.torch

DOMAINS = {"day": 3.0, "night": -1.0}
STEPS = 50


class Own(torch.nn.Module):
    """As many write it; gamma and beta train, and in one process the running statistics do, too."""

    def __init__(self, num_features):
        super().__init__()
        self.gamma, self.beta = (
            torch.nn.Parameter(value) for value in (torch.ones(num_features), torch.zeros(num_features))
        )
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
        self.running_var = 0.9 * self.running_var + 0.1 * var.detach()
        centred = x - mean[:, None, None]
        normalised = centred / (var[:, None, None] + 1e-5).sqrt()
        return (self.gamma[:, None, None] * normalised + self.beta[:, None, None]).relu()


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


def batch(domain, step):
    rng = np.random.default_rng([list(DOMAINS).index(domain), step])
    return (rng.standard_normal((12, 16, 8, 8)) + DOMAINS[domain]).astype(np.float32)


def replicated():
    """Running means of the usual one by step, in two replicas a step."""
    layer, history = Own(16), []
    for step in range(STEPS):
        for part in torch.from_numpy(batch("day", step)).split(6):
            copy.deepcopy(layer)(part)  # on another device; gradients come back, buffers do not
        history.append(layer.running_mean.mean().item())
    return history


def by_domain():
    """Running means by domain and step, and the layer."""
    layer, history = DomainBatchNorm(16, DOMAINS), {domain: [] for domain in DOMAINS}
    for step in range(STEPS):
        for domain in DOMAINS:
            x = batch(domain, step)
            results = layer.forward_train((x[:5], x[5:6], x[6:]), domain)
            gradients = [cubn.backward(np.ones_like(y), saved) for y, saved in results]
            layer.gamma -= 0.01 * sum(g.dgamma for g in gradients)
            layer.beta -= 0.01 * sum(g.dbeta for g in gradients)
            history[domain].append(float(layer.states[domain].running_mean.mean()))
    return history


def kept(layer):
    """Bytes that autograd keeps for the backward, for each byte of the input; one array counts once."""
    x = torch.from_numpy(batch("day", 0)).requires_grad_()
    arrays = {}

    def pack(tensor):
        arrays[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(arrays.values()) / x.nbytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", metavar="PATH", help="draw it, as SVG or PNG")
    arguments = parser.parse_args()

    lost, history = replicated(), by_domain()
    print(
        f"replicated, as usual: running mean {lost[-1]:+.2f} after {STEPS} steps of data around {DOMAINS['day']:+.0f}"
    )
    assert lost[-1] == 0
    for domain, level in DOMAINS.items():
        print(f"a state per domain: {domain:<5} has running mean {history[domain][-1]:+.2f}")
        assert abs(history[domain][-1] - level) < 0.1

    memory = {"by its formulas": kept(Own(16)), "cubn.torch": kept(cubn.torch.BatchNormReLU2d(16))}
    for name, factor in memory.items():
        print(f"kept for the backward, {name}: {factor:.2f} times the input")
    assert memory["cubn.torch"] < 1.3 < 3 < memory["by its formulas"]
    if arguments.figure:
        draw(lost, history, memory, arguments.figure)

    # The same, with the whole batch at hand: the same bits.
    x = batch("night", 0)
    whole, cut = cubn.BatchNormState(16), cubn.BatchNormState(16)
    y, _ = cubn.forward_train(x, whole)
    moments = cubn.moments(x[:5]).merge(cubn.moments(x[5:], start=5))
    cubn.update(cut, moments)
    assert np.array_equal(whole.running_mean, cut.running_mean)
    assert np.array_equal(whole.running_var, cut.running_var)
    assert np.array_equal(y, cubn.normalize(x, moments, gamma=cut.gamma, beta=cut.beta))
    print("moments of parts, merged, then normalize and update: the bits of forward_train")


def draw(lost, history, memory, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.plot(lost, color="#d55e00", label="usual, replicated (day)")
    for (domain, values), style in zip(history.items(), ("-", "--"), strict=True):
        left.plot(values, style, color="#0072b2", label=f"cubn, a state per domain ({domain})")
    left.set(xlabel="step", ylabel="running mean")
    left.set_title("Running statistics that stay", loc="left")
    left.legend(frameon=False, fontsize="small", loc="center right")
    bars = right.barh(list(memory), list(memory.values()), color=["#d55e00", "#0072b2"])
    right.bar_label(bars, fmt="%.1f×", padding=3)
    right.set(xlabel="kept for the backward / input", xlim=(0, 1.25 * max(memory.values())))
    right.set_title("Memory", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
