"""The networks that are trained, each made of the layers of a contestant, and their training steps."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

import cubn

from .layers import BatchNorm, Layers, Torch, contestants, with_relu_apart, with_relu_timed
from .shares import Step, Timed, TimedStep
from .workloads import MEMORY_FORMATS


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Convolutions with batch norm and ReLU between them, and a shortcut that is added before the last ReLU."""

    def __init__(self, layers: Layers, convolutions: list[nn.Conv2d], stride: int) -> None:
        super().__init__()
        inputs, outputs = convolutions[0].in_channels, convolutions[-1].out_channels
        body: list[nn.Module] = []
        for one in convolutions[:-1]:
            body += [one, layers.norm_relu(one.out_channels)]
        self.body = nn.Sequential(*body, convolutions[-1])
        self.end = layers.norm_add_relu(outputs)
        projected = inputs != outputs or stride != 1
        self.shortcut = (
            nn.Sequential(conv(inputs, outputs, 1, stride), layers.norm(outputs)) if projected else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.body(x), self.shortcut(x))


def basic(layers: Layers, inputs: int, outputs: int, stride: int) -> Block:
    return Block(layers, [conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)], stride)


def bottleneck(layers: Layers, inputs: int, outputs: int, stride: int) -> Block:
    width = outputs // 4
    return Block(layers, [conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, outputs, 1)], stride)


def stages(block: Callable[..., Block], layers: Layers, inputs: int, counts: dict[int, int]) -> Iterator[Block]:
    """By outputs, so many blocks; the first of each stage but the first halves the extents."""
    for i, (outputs, count) in enumerate(counts.items()):
        for j in range(count):
            yield block(layers, inputs, outputs, 2 if i and not j else 1)
            inputs = outputs


def pooled(channels: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)


def resnet20(layers: Layers) -> nn.Module:
    blocks = stages(basic, layers, 16, {16: 3, 32: 3, 64: 3})
    return nn.Sequential(conv(3, 16, 3), layers.norm_relu(16), *blocks, *pooled(64, 10))


def resnet50(layers: Layers) -> nn.Module:
    blocks = stages(bottleneck, layers, 64, {256: 3, 512: 4, 1024: 6, 2048: 3})
    stem = conv(3, 64, 7, 2), layers.norm_relu(64), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *blocks, *pooled(2048, 1000))


def tower(layers: Layers) -> nn.Module:
    """That of examples/output_independent_of_batch.py: a policy for a board of 7 × 6."""
    blocks = stages(basic, layers, 64, {64: 19})
    policy = conv(64, 2, 1), layers.norm_relu(2), nn.Flatten(), nn.Linear(2 * 7 * 6, 7)
    return nn.Sequential(conv(2, 64, 3), layers.norm_relu(64), *blocks, *policy)


def mlp(layers: Layers) -> nn.Module:
    hidden = [part for _ in range(4) for part in (nn.Linear(1024, 1024, bias=False), layers.norm_relu(1024))]
    return nn.Sequential(*hidden, nn.Linear(1024, 10))


class Largest(nn.Module):
    """Of each channel, over all points."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.amax(2)


def pointnet(layers: Layers) -> nn.Module:
    """The classifier of PointNet, without its transformations."""
    parts: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 64), (64, 64), (64, 128), (128, 1024)):
        parts += [nn.Conv1d(inputs, outputs, 1, bias=False), layers.norm_relu(outputs)]
    parts.append(Largest())
    for inputs, outputs in ((1024, 512), (512, 256)):
        parts += [nn.Linear(inputs, outputs, bias=False), layers.norm_relu(outputs)]
    return nn.Sequential(*parts, nn.Linear(256, 40))


class Network(NamedTuple):
    build: Callable[[Layers], nn.Module]
    x: tuple[int, ...]
    """The shape of a batch."""
    classes: int


NETWORKS = {
    "resnet20": Network(resnet20, (32, 3, 32, 32), 10),
    "resnet50": Network(resnet50, (4, 3, 224, 224), 1000),
    "tower": Network(tower, (64, 2, 7, 6), 7),
    "mlp": Network(mlp, (256, 1024), 10),
    "pointnet": Network(pointnet, (16, 3, 2048), 40),
}


class Trained(NamedTuple):
    """A model that was made, and what it is given."""

    model: nn.Module
    x: torch.Tensor
    target: torch.Tensor

    def step(self) -> None:
        """A training step but for the optimizer's, which is the same for all."""
        self.model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(self.x), self.target).backward()


def trained(network: Network, layout: str, layers: Layers) -> Trained:
    """The same weights and data for all layers."""
    torch.manual_seed(0)
    model = network.build(layers)
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
            # torch's own choice lets what no batch norm rescales shrink to subnormal numbers, which are slow.
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    x, target = torch.randn(network.x), torch.randint(network.classes, network.x[:1])
    if layout == "nhwc":
        format = MEMORY_FORMATS[x.ndim]
        model, x = model.to(memory_format=format), x.contiguous(memory_format=format)
    return Trained(model, x, target)


def steps(name: str, layout: str, compiled: bool = False) -> dict[str, Step]:
    """A step of each contestant; with `compiled`, of torch's network through torch.compile, too."""
    network = NETWORKS[name]
    by_contestant = contestants(len(network.x))
    of_all = {contestant: trained(network, layout, layers) for contestant, layers in by_contestant.items()}
    if compiled:
        eager = trained(network, layout, by_contestant["torch"])
        of_all["compiled"] = eager._replace(model=torch.compile(eager.model, dynamic=False))
    return {contestant: one.step for contestant, one in of_all.items()}


def timed_steps(name: str, layout: str) -> dict[str, TimedStep]:
    """Steps whose calls are timed: of batch norm alone, and with addition and ReLU."""
    of_all = {}
    for contestant, calls in {"torch": Torch, "cubn": cubn}.items():
        alone, fused = Timed(calls), Timed(calls)
        apart = with_relu_apart(lambda channels, calls=alone: BatchNorm(channels, calls=calls))
        of_all[contestant] = TimedStep(trained(NETWORKS[name], layout, apart).step, alone)
        together = trained(NETWORKS[name], layout, with_relu_timed(fused))
        of_all[f"{contestant} + ReLU"] = TimedStep(together.step, fused)
    return of_all
