"""My network's output for one sample changes with the batch size. Which layer is it?

A policy for a board of 7 x 6 in torch: a residual tower (19 blocks of 3x3 convolutions, 64 channels, batch norm, ReLU)
and a head, in inference. Row 0 of its output is computed alone and with 62 others, and `batch_invariance` names every
layer whose bits depend on that: convolutions and the linear layer, where the libraries behind them compute in another
order for other batch sizes, and never a batch norm.
"""

import torch
from torch import nn

import cubn.torch

CHANNELS, BLOCKS, MOVES = 64, 19, 7


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = convolution(CHANNELS), cubn.torch.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = convolution(CHANNELS), cubn.torch.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def convolution(inputs):
    return nn.Conv2d(inputs, CHANNELS, 3, padding=1, bias=False)


def tower():
    """The network, as training might leave it, in inference."""
    torch.manual_seed(0)
    stem = convolution(2), cubn.torch.BatchNorm2d(CHANNELS), nn.ReLU()
    policy = nn.Conv2d(CHANNELS, 2, 1), cubn.torch.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 7 * 6, MOVES)
    model = nn.Sequential(*stem, *(Block() for _ in range(BLOCKS)), *policy)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 1, 3)
            nn.init.uniform_(module.weight, 0.5, 1)
    return model.eval()


def boards(count):
    return torch.randn(count, 2, 7, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def main():
    model, x = tower(), boards(63)
    difference = (model(x)[0] - model(x[:1])[0]).abs().max().item()
    print(f"row 0 alone and among 63: outputs differ by up to {difference:.1e}\n")

    report = cubn.torch.batch_invariance(model, x, batch_sizes=(1, 2, 16, 62))
    print(report)
    guilty = {layer.kind for layer in report.guilty[:-1]}  # the last row is the whole model
    assert guilty <= {"Conv2d", "Linear"} and bool(guilty) >= (difference > 0)
    print("kinds of layers that depend on the batch:", ", ".join(sorted(guilty)) or "none")


if __name__ == "__main__":
    main()
