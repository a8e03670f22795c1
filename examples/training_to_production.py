"""It works in training, and not in production: four ways in which that happens, and what happens here.

A small network of torch's own layers learns handwritten digits, in pixels of 12 bits as a camera has them. Then it is
used: two images at a time with the train mode left on; in float16; on images of another camera; and after its last
layer was fine-tuned on those. Each time the accuracy on the images that it should know falls. With cubn it does not:
batch norms become part of the layers before them, and have no mode; statistics stay float32 under 16-bit data; they are
examined and taken again for other data; and frozen is frozen.

    python examples/training_to_production.py --figure docs/figures/training_to_production.png
"""

import argparse
import copy
import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import cubn
import cubn.torch


def data():
    """Training images and labels, and those for tests; pixels from 0 to 4095."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images * (4095 / 16), dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:1400]], y[order[:1400]]), (x[order[1400:1796]], y[order[1400:1796]])


def other_camera(x):
    """Less contrast, more light."""
    return 0.2 * x + 3000


def network():
    torch.manual_seed(0)
    parts = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode="replicate")
        parts += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    hidden = nn.Flatten(), nn.Linear(512, 64), nn.BatchNorm1d(64), nn.ReLU()
    return nn.Sequential(*parts, *hidden, nn.Linear(64, 10))


def train(model, samples, parameters, epochs):
    """Stochastic gradient descent on some of the parameters; the modes of modules are as they were."""
    x, y = samples
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model, samples, each=None):
    """The share that is right, of images that go through the model so many at a time."""
    x, y = samples
    dtype = next(model.parameters()).dtype
    logits = torch.cat([model(part) for part in x.to(dtype).split(each or len(x))])
    return (logits.argmax(1) == y).double().mean().item()


def train_mode_left_on(trained, test):
    """Two images at a time; of one alone torch's BatchNorm1d refuses to. An export in training mode does the same."""
    usual = accuracy(copy.deepcopy(trained).train(), test, each=2)
    folded, _ = cubn.torch.fold(copy.deepcopy(trained).eval())
    return usual, accuracy(folded.train(), test, each=2)


def in_float16(trained, test):
    """`half()`: the variances of 12-bit pixels are more than float16 holds."""
    usual = accuracy(copy.deepcopy(trained).eval().half(), test)
    converted = cubn.torch.convert(copy.deepcopy(trained)).eval()
    with warnings.catch_warnings(action="ignore"):  # it says that statistics stay float32
        converted.half()
    return usual, accuracy(converted, test)


def on_another_camera(trained, test):
    """Images without labels are enough to see it, and to take statistics again."""
    model, x = copy.deepcopy(trained).eval(), other_camera(test[0])
    usual = accuracy(model, (x, test[1]))
    report = cubn.diagnose(model[1], cubn.moments(model[0](x).detach()))
    assert "stale" in {found.rule for found in report.findings}
    cubn.recalibrate(model, x.split(50))
    return usual, accuracy(model, (x, test[1]))


def after_fine_tuning(trained, training, test):
    """The last layer learns the other camera's images; the first camera's are seen afterwards."""
    results, samples = [], (other_camera(training[0][:500]), training[1][:500])
    for freeze in (False, True):
        model = copy.deepcopy(trained).train()
        if freeze:
            cubn.torch.convert(model)
            for norm in (model[1], model[4], model[8]):
                norm.freeze()
        head = copy.deepcopy(model[-1].state_dict())
        train(model, samples, model[-1].parameters(), epochs=2)
        model[-1].load_state_dict(head)  # for the first camera: its own last layer
        results.append(accuracy(model.eval(), test))
    return tuple(results)


def one_value_per_channel():
    """A batch of one in training: an error that says what to do, and no state is touched."""
    state = cubn.BatchNormState(6)
    try:
        cubn.forward_train(np.ones((1, 6), np.float32), state)
    except ValueError as error:
        assert (state.running_var == 1).all() and not state.tracked.any()
        return str(error)
    raise AssertionError("a batch of one was trained on")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", metavar="PATH", help="draw it, as SVG or PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small arrays gain nothing of more
    training, test = data()
    trained = network()
    train(trained, training, trained.parameters(), epochs=4)
    known = accuracy(copy.deepcopy(trained).eval(), test)
    print(f"{'accuracy on test images':40}{known:8.1%}\n")
    found = {
        "two at a time, train mode left on": train_mode_left_on(trained, test),
        "in float16": in_float16(trained, test),
        "on another camera's images": on_another_camera(trained, test),
        "after fine-tuning on those": after_fine_tuning(trained, training, test),
    }
    print(f"{'':40}{'usual':>8}{'cubn':>8}")
    for name, (usual, ours) in found.items():
        print(f"{name:40}{usual:8.1%}{ours:8.1%}")
    assert all(usual < known - 0.1 and ours > known - 0.03 for usual, ours in found.values())
    if arguments.figure:
        draw(known, found, arguments.figure)
    print("\none value per channel:", one_value_per_channel())


def draw(known, found, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(found))
    for i, (label, colour) in enumerate((("usual", "#d55e00"), ("cubn", "#0072b2"))):
        values = [100 * pair[i] for pair in found.values()]
        bars = axes.barh(rows + 0.4 * i, values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.axvline(100 * known, color="0.4", linestyle=":", label="in training")
    axes.set_yticks(rows + 0.2, list(found))
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on test images, %", xlim=(0, 112))
    axes.set_title("It worked in training", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
