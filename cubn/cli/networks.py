"""The batch norms of well-known networks: channels, positions, and what a network that fuses does in them besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Layer(NamedTuple):
    """One, or several alike."""

    channels: int
    size: int  # of its images, which are square
    residual: bool
    relu: bool


def _halved(size: int) -> int:
    return -(-size // 2)


def _resnet(blocks: tuple[int, ...], bottleneck: bool) -> Callable[[int], Iterator[Layer]]:
    """As torchvision has them: a bottleneck's stride is that of its 3 x 3 convolution. He et al. 2016."""

    def layers(image: int) -> Iterator[Layer]:
        size = _halved(image)
        yield Layer(64, size, False, True)
        size, channels = _halved(size), 64
        for stage, number in enumerate(blocks):
            width = 64 << stage
            wide = 4 * width if bottleneck else width
            for block in range(number):
                before = size
                if stage and not block:
                    size = _halved(size)
                if bottleneck:
                    yield Layer(width, before, False, True)
                yield Layer(width, size, False, True)
                yield Layer(wide, size, True, True)
                if channels != wide or size != before:
                    yield Layer(wide, size, False, False)  # of the shortcut
                channels = wide

    return layers


NETWORKS: dict[str, Callable[[int], Iterator[Layer]]] = {
    "resnet18": _resnet((2, 2, 2, 2), False),
    "resnet34": _resnet((3, 4, 6, 3), False),
    "resnet50": _resnet((3, 4, 6, 3), True),
    "resnet101": _resnet((3, 4, 23, 3), True),
    "resnet152": _resnet((3, 8, 36, 3), True),
}
"""The layers of each, of images of a size."""
