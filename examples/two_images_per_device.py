"""Two images per device: per-device statistics are noise, synchronised ones are the whole batch's, bit for bit.

The devices are slices of one array here. Each computes the moments of its own images, told the index of its first one;
merged, they are the moments of the whole batch, for any split, uneven and empty ones included.
"""

from functools import reduce
from itertools import pairwise

import numpy as np

import cubn


def synchronised(x, edges):
    """y and the moments, as computed by devices holding x[edges[i]:edges[i + 1]]."""
    ranges = list(pairwise(edges))
    parts = [cubn.moments(x[start:stop], start=start) for start, stop in ranges]
    whole = reduce(cubn.Moments.merge, parts)
    return np.concatenate([cubn.normalize(x[start:stop], whole) for start, stop in ranges]), whole


def main():
    rng = np.random.default_rng(0)
    images = rng.normal(rng.normal(0, 1, (32, 1, 1, 1)), 1, (32, 8, 20, 20)).astype(
        np.float32
    )  # each image its own level
    expected, _ = cubn.forward_train(images, cubn.BatchNormState(8))
    moments = cubn.moments(images)

    for name, edges in (
        ("16 devices, two images each", range(0, 33, 2)),
        ("5 devices, uneven", (0, 1, 4, 5, 20, 32)),
        ("4 devices, two of them empty", (0, 0, 7, 7, 32)),
    ):
        y, merged = synchronised(images, edges)
        assert np.array_equal(y, expected)
        assert np.array_equal(merged.mean, moments.mean) and np.array_equal(merged.m2, moments.m2)
        print(f"{name}: the same bits as one device holding all 32 images")

    alone = np.concatenate([cubn.forward_train(images[i : i + 2], cubn.BatchNormState(8))[0] for i in range(0, 32, 2)])
    error = np.abs(alone - expected).mean()
    print(f"without synchronisation: outputs off by {error:.2f} on average")
    assert error > 0.1


if __name__ == "__main__":
    main()
