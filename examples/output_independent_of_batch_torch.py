"""My network's output for one sample changes with the batch size. Which layer is it?

A policy for a board of 7 x 6 in torch: a residual tower (19 blocks of 3x3 convolutions, 64 channels, batch norm, ReLU)
and a head, in inference. Row 0 of its output differs between a batch of one and one of 63, and batch norm is blamed.
`convert` makes the batch norms cubn's, whose output for a sample provably never depends on the others. Then
`batch_invariance` names every layer whose bits do: convolutions and the linear layer, where the libraries behind them
compute in another order for other batch sizes.

    python examples/output_independent_of_batch_torch.py --figure docs/figures/output_independent_of_batch.png
"""

import argparse

import torch
from torch import nn

import cubn.torch

CHANNELS, BLOCKS, MOVES = 64, 19, 7


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = convolution(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = convolution(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def convolution(inputs):
    return nn.Conv2d(inputs, CHANNELS, 3, padding=1, bias=False)


def tower():
    """The network, as training might leave it, in inference."""
    torch.manual_seed(0)
    stem = convolution(2), nn.BatchNorm2d(CHANNELS), nn.ReLU()
    policy = nn.Conv2d(CHANNELS, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 7 * 6, MOVES)
    model = nn.Sequential(*stem, *(Block() for _ in range(BLOCKS)), *policy)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 1, 3)
            nn.init.uniform_(module.weight, 0.5, 1)
    return model.eval()


def boards(count):
    return torch.randn(count, 2, 7, 6, generator=torch.Generator().manual_seed(1))


def difference(model, x):
    """How far row 0 of the output is from what it is alone."""
    return (model(x)[0] - model(x[:1])[0]).abs().max().item()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", metavar="PATH", help="draw it, as SVG or PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same bits on any number of cores
    model, x = tower(), boards(63)
    print(f"row 0 alone and among 63, torch's batch norms: outputs differ by up to {difference(model, x):.1e}")
    cubn.torch.convert(model)
    apart = difference(model, x)
    print(f"row 0 alone and among 63, cubn's batch norms:  outputs differ by up to {apart:.1e}\n")

    report = cubn.torch.batch_invariance(model, x, batch_sizes=(1, 62))
    print(report)
    guilty = {layer.kind for layer in report.guilty[:-1]}  # the last row is the whole model
    assert guilty <= {"Conv2d", "Linear"} and bool(guilty) >= (apart > 0)
    if arguments.figure:
        draw(report.layers[:-1], arguments.figure)
    print("kinds of layers that depend on the batch:", ", ".join(sorted(guilty)) or "none")


def draw(layers, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    kinds = {"Conv2d": ("o", "#d55e00"), "Linear": ("D", "#cc79a7"), "BatchNorm2d": ("s", "#0072b2")}
    for kind, (marker, colour) in kinds.items():
        points = [(i, layer.max_abs) for i, layer in enumerate(layers) if layer.kind == kind]
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, label=f"{kind} ({len(points)})")
    axes.set_yscale("symlog", linthresh=1e-8)
    axes.set_ylim(-2e-9, None)
    axes.set_yticks([0, 1e-8, 1e-7, 1e-6, 1e-5], ["0: the same bits", "1e-8", "1e-7", "1e-6", "1e-5"])
    axes.set(xlabel="layer, in order of execution", ylabel="row 0: largest difference")
    axes.set_title("Each layer by itself: does its output for one sample depend on the batch?", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
