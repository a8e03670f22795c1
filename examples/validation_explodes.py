"""Validation explodes though training is fine, and heals when the learning rate drops.

A perceptron of torch's own layers learns handwritten digits. A warm restart multiplies the learning rate by five: the
weights, and with them what batch norms are given, then move faster than the running statistics follow. The loss in
train mode is what such a restart costs; in eval mode it is more than ten times that. The monitor warns before the next
validation shows it, `train_eval_gap` says which layer does it, and `recalibrate` ends it, without a step of training.

And the other way to the same end: an overflow in one batch. torch's running statistics are NaN from then on; cubn's
leave that channel as it was.

    python examples/validation_explodes.py --figure docs/figures/validation_explodes.png
"""

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import cubn.torch
from cubn.health import Monitor, train_eval_gap

EPOCH = 44  # steps of 32 images; validated after each
RESTART, END = 5 * EPOCH, 6 * EPOCH
RATES = [0.05] * RESTART + [0.25] * EPOCH + [0.01] * 3 * EPOCH


def data():
    """Training images and labels, and those for validation."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:1400]], y[order[:1400]]), (x[order[1400:]], y[order[1400:]])


def network(layers=6, width=64):
    torch.manual_seed(0)
    parts = []
    for _ in range(layers):
        parts += [nn.Linear(64, width), nn.BatchNorm1d(width, momentum=0.02), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, 10))


@torch.no_grad()
def loss(model, samples, training):
    """The mean loss, by batch statistics or by running ones; the model is left as it is."""
    x, y = samples
    return cross_entropy(copy.deepcopy(model).train(training)(x), y).item()


def train(model, training, validation, monitor):
    """Yield (step, train-mode loss, eval-mode loss) of the validation set, four times an epoch, for the figure."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATES[0], momentum=0.9)
    batches = torch.Generator().manual_seed(1)
    x, y = training
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(x), (32,), generator=batches)
        optimizer.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        monitor.step()
        if (step + 1) % (EPOCH // 4) == 0:
            yield step, loss(model, validation, training=True), loss(model, validation, training=False)


def an_overflow():
    """Running means after one batch with an infinity in channel 2: torch's and cubn's."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    x[3, 2] = torch.inf
    results = []
    for norm in (nn.BatchNorm1d(4), cubn.torch.BatchNorm1d(4)):
        norm(x)
        norm(x.nan_to_num(posinf=0))  # good ones afterwards
        results.append(norm.running_mean.isfinite().tolist())
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", metavar="PATH", help="draw it, as SVG or PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small arrays gain nothing of more
    training, validation = data()
    model, losses, broken = network(), [], None
    monitor = Monitor(model, every=1, on_finding=lambda found: print(f"       {found.rule}: layer {found.layer}"))
    print("step   train mode   eval mode")
    for step, by_batch, by_running in train(model, training, validation, monitor):
        losses.append((step, by_batch, by_running))
        if (step + 1) % EPOCH:
            continue
        print(f"{step:4}   {by_batch:10.3f}   {by_running:9.3f}")
        if broken is None and by_running > 10 * by_batch:
            broken, seen_by_validation = copy.deepcopy(model), step
    monitor.close()

    noticed = next(noticed for noticed in monitor.findings if noticed.step >= RESTART)
    flagged = noticed.step
    print(f"\nthe learning rate jumps at step {RESTART}; validation shows it at step {seen_by_validation}")
    print(f"the monitor warns at step {flagged}, of layer {noticed.finding.layer}: {noticed.finding.message}")
    assert RESTART <= flagged < seen_by_validation

    gap = train_eval_gap(broken, [training[0][:700], training[0][700:]])
    print(f"\n{gap}\n")

    repaired = copy.deepcopy(broken)
    cubn.recalibrate(repaired, training[0].split(32))
    by_batch, by_running = (loss(broken, training, mode) for mode in (True, False))
    healed = loss(repaired, training, training=False)
    print(f"the network of step {seen_by_validation}, on the training set: loss in train mode {by_batch:.4f},")
    print(f"in eval mode {by_running:.2f}, and recalibrated {healed:.4f}")
    assert by_running > 10 * by_batch and abs(healed - by_batch) < 0.02 * by_batch

    of_torch, of_cubn = an_overflow()
    assert of_torch == [True, True, False, True] and all(of_cubn)
    print("an overflow in channel 2: torch's running mean is not finite from then on, cubn's is")
    if arguments.figure:
        draw(losses, flagged, (seen_by_validation, loss(repaired, validation, training=False)), gap, arguments.figure)


def draw(losses, flagged, repaired, gap, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    steps, by_batch, by_running = zip(*losses, strict=True)
    left.axvspan(RESTART, END, color="0.9", label="high learning rate")
    every = slice(3, None, 4)
    left.plot(steps, by_running, "o-", markersize=4, markevery=every, color="#d55e00", label="eval mode")
    left.plot(steps, by_batch, "s-", markersize=4, markevery=every, color="#0072b2", label="train mode")
    left.axvline(flagged, color="0.3", linestyle=":", label=f"the monitor warns: step {flagged}")
    left.plot(*repaired, "*", markersize=12, color="#009e73", label=f"recalibrated at step {repaired[0]}")
    left.set_yscale("log")
    left.set(xlabel="step", ylabel="validation loss (● once an epoch)")
    left.legend(framealpha=1, edgecolor="none", fontsize="small", loc="upper left")
    left.set_title("Validation explodes, train mode is fine", loc="left")
    layers = sorted(gap.layers, key=lambda layer: int(layer.name))
    bars = right.barh([f"layer {layer.name}" for layer in layers], [layer.alone for layer in layers], color="#d55e00")
    right.bar_label(bars, fmt="%.2g", padding=3)
    right.margins(x=0.2)
    right.invert_yaxis()
    right.set(xlabel="change of the model's output")
    right.set_title("One layer in eval mode: which is it?", loc="left", fontsize="medium")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
