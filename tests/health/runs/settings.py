"""What a run is, drawn from its seed."""

import math
from dataclasses import dataclass

import numpy as np

TESTED = 1000
"""Seeds below are for tests; those above, for thresholds."""
NETWORKS = ("numpy perceptron", "perceptron", "convolutional", "resnet8", "resnet20")
SHARES = (0.25, 0.25, 0.25, 0.2, 0.05)
"""How often each is drawn; the last takes longest."""
IMAGES = {"resnet8": 10_000, "resnet20": 5_000}
"""Networks that are slow are trained on so many."""


@dataclass(frozen=True)
class Settings:
    """One training run; `of_input`: of perceptrons, the pixels are normalized too, of which some are constant."""

    seed: int
    network: str = "perceptron"
    layers: int = 2
    width: int = 32
    library: str = "torch"
    affine: bool = True
    of_input: bool = False
    eps: float = 1e-5
    momentum: float | None = 0.1
    half: bool = False
    batch: int = 32
    rate: float = 0.05
    optimizer: str = "sgd"
    steps: int = 120


def draw(seed):
    """Usual settings, over the whole of their ranges."""
    rng = np.random.default_rng(seed)
    network = str(rng.choice(NETWORKS, p=SHARES))
    momentum = [0.01, 0.02, 0.05, 0.1, 0.1, 0.2, 0.5, None][rng.integers(8)]
    batch = int(2 ** rng.uniform(3, 8))
    forgotten = math.ceil(4 / (momentum or 0.1))  # exp(-4) of a running average's zeros and ones is left
    steps = max(forgotten, min(max(100, 3 * 1400 // batch), 300))
    if network in IMAGES:
        batch = max(8, min(batch, IMAGES[network] // forgotten))
        steps = max(forgotten, min(steps, IMAGES[network] // batch))
    optimizer = "sgd" if "numpy" in network else str(rng.choice(["sgd", "adam"]))
    rates = {"sgd": (-2.5, -0.7), "adam": (-3.5, -2)}[optimizer]
    return Settings(
        seed=seed,
        network=network,
        layers=int(rng.integers(1, 5)),
        width=int(rng.choice([8, 16, 24] if "resnet" in network or network == "convolutional" else [16, 32, 64, 100])),
        library=str(rng.choice(["torch", "cubn"])),
        of_input="perceptron" in network and bool(rng.random() < 0.25),
        affine=bool(rng.random() < 0.85),
        eps=float(rng.choice([1e-5, 1e-5, 1e-3, 1e-6])),
        momentum=momentum,
        half=bool(rng.random() < 0.25),
        batch=batch,
        rate=float(10 ** rng.uniform(*rates)),
        optimizer=optimizer,
        steps=steps,
    )
