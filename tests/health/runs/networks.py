"""Small networks for the digits, in NumPy with cubn and in torch with either's batch norms."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn

import cubn
import cubn.torch


class Perceptron:
    """Linear layers, batch norms and ReLUs in NumPy; with a batch norm of the pixels before them, or without."""

    def __init__(self, settings):
        rng = np.random.default_rng(settings.seed)
        widths = [64] + [settings.width] * settings.layers
        weights = [rng.normal(0, (2 / a) ** 0.5, (a, b)).astype(np.float32) for a, b in pairwise(widths)]
        self.weights = {"input": None} if settings.of_input else {}
        self.weights |= {f"layer{i}": weight for i, weight in enumerate(weights)}
        options = dict(eps=settings.eps, momentum=settings.momentum, affine=settings.affine)
        self.states = {
            name: cubn.BatchNormState(64 if weight is None else settings.width, **options)
            for name, weight in self.weights.items()
        }
        self.head = rng.normal(0, 0.1, (settings.width, 10)).astype(np.float32)
        self.dtype = np.float16 if settings.half else np.float32

    def forward(self, images, normalize):
        """The logits; `normalize(x, state, relu=)` is how batch norms are computed."""
        self.inputs = {}
        x = images.reshape(len(images), -1)
        for name, weight in self.weights.items():
            self.inputs[name] = x
            product = x if weight is None else x @ weight
            y = normalize(product.astype(self.dtype), self.states[name], relu=weight is not None)
            x = y.astype(np.float32)
        self.features = x
        return x @ self.head

    def train(self, images):
        """The logits, and what the backward needs is kept."""
        self.saved = []

        def normalize(x, state, relu):
            y, saved = cubn.forward_train(x, state, relu=relu)
            self.saved.append(saved)
            return y

        return self.forward(images, normalize)

    def descend(self, dlogits, rate):
        """One step against the gradient."""
        dx, rate = dlogits @ self.head.T, np.float32(rate)
        self.head -= rate * self.features.T @ dlogits
        for (name, weight), saved in zip(reversed(self.weights.items()), reversed(self.saved), strict=True):
            gradients = cubn.backward(dx.astype(self.dtype), saved)
            state = self.states[name]
            if state.gamma is not None:
                state.gamma -= rate * gradients.dgamma
                state.beta -= rate * gradients.dbeta
            if weight is not None:
                of_product = gradients.dx.astype(np.float32)
                dx = of_product @ weight.T
                weight -= rate * self.inputs[name].T @ of_product


def build(settings):
    """The network of these settings, in torch."""
    torch.manual_seed(settings.seed)
    if settings.network == "perceptron":
        return _perceptron(settings)
    if settings.network == "convolutional":
        return _convolutional(settings)
    return _residual(settings, blocks={"resnet8": 1, "resnet20": 3}[settings.network])


class Half(nn.Module):
    """A batch norm whose data is float16."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.half()).float()


def _norm(settings, dims, width):
    library = nn if settings.library == "torch" else cubn.torch
    kind = getattr(library, f"BatchNorm{dims}d")
    norm = kind(width, eps=settings.eps, momentum=settings.momentum, affine=settings.affine)
    return Half(norm) if settings.half else norm


def _perceptron(settings):
    parts, inputs = [nn.Flatten(), *([_norm(settings, 1, 64)] if settings.of_input else [])], 64
    for _ in range(settings.layers):
        parts += [nn.Linear(inputs, settings.width), _norm(settings, 1, settings.width), nn.ReLU()]
        inputs = settings.width
    return nn.Sequential(*parts, nn.Linear(inputs, 10))


def _convolution(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _convolutional(settings):
    parts, inputs = [], 1
    for i in range(settings.layers):
        stride = 2 if i in (0, 2) else 1
        parts += [_convolution(inputs, settings.width, stride), _norm(settings, 2, settings.width), nn.ReLU()]
        inputs = settings.width
    extent = 4 if settings.layers < 3 else 2
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(inputs * extent**2, 10))


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, settings, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = _convolution(inputs, outputs, stride), _norm(settings, 2, outputs)
        self.conv2, self.bn2 = _convolution(outputs, outputs), _norm(settings, 2, outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs:
            around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(around, _norm(settings, 2, outputs))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


def _residual(settings, blocks):
    inputs, width = 8, 8
    parts = [_convolution(1, inputs), _norm(settings, 2, inputs), nn.ReLU()]
    for stage in range(3):
        for i in range(blocks):
            stride = 2 if stage and i == 0 else 1
            parts.append(Block(settings, inputs, width << stage, stride))
            inputs = width << stage
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
