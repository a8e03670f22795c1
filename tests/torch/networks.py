"""Residual networks of the usual structure and names of parameters, as narrow as asked for."""

from torch import nn


class Block(nn.Module):
    """Two or three convolutions beside a shortcut."""

    def __init__(self, channels, width, stride, norm, bottleneck):
        super().__init__()
        out = 4 * width if bottleneck else width
        shapes = [(channels, width, 1), (width, width, 3), (width, out, 1)]
        shapes = shapes if bottleneck else [(channels, width, 3), (width, out, 3)]
        strided = 2 if bottleneck else 1  # which of the convolutions
        for i, (before, after, kernel) in enumerate(shapes, 1):
            step = stride if i == strided else 1
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", norm(after))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))
        self.depth = len(shapes)

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = self.relu(y) if i < self.depth else y
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """He et al. 2016: a stem, four stages of blocks, a linear classifier."""

    def __init__(self, blocks, width, norm, bottleneck, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for i in range(count):
                block = Block(channels, width << stage, 2 if stage and not i else 1, norm, bottleneck)
                channels = (width << stage) * (4 if bottleneck else 1)
                layers.append(block)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(norm=nn.BatchNorm2d, width=8):
    return ResNet([2, 2, 2, 2], width, norm, bottleneck=False)


def resnet50(norm=nn.BatchNorm2d, width=4):
    return ResNet([3, 4, 6, 3], width, norm, bottleneck=True)
