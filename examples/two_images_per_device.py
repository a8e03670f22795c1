"""Two images per device: per-device statistics are noise, synchronised ones are the whole batch's, bit for bit.

The devices are threads here, each with its part of the images and a communicator. With MPI they are processes, and the
communicator is MPI.COMM_WORLD; nothing else changes.
"""

from itertools import pairwise

import numpy as np

import cubn
from cubn.sync import threads


def main():
    rng = np.random.default_rng(0)
    levels = rng.normal(0, 1, (32, 1, 1, 1))  # each image has its own
    images = rng.normal(levels, 1, (32, 8, 20, 20)).astype(np.float32)
    gradient = rng.normal(0, 1, images.shape).astype(np.float32)
    expected, saved = cubn.forward_train(images, cubn.BatchNormState(8))
    expected_gradients = cubn.backward(gradient, saved)

    for name, edges in (
        ("16 devices, two images each", range(0, 33, 2)),
        ("5 devices, uneven", (0, 1, 4, 5, 20, 32)),
        ("4 devices, two of them empty", (0, 0, 7, 7, 32)),
    ):
        parts = [slice(*edge) for edge in pairwise(edges)]

        def train(comm, parts=parts):
            mine = parts[comm.rank]
            y, saved = cubn.forward_train(images[mine], cubn.BatchNormState(8), comm=comm)
            return y, cubn.backward(gradient[mine], saved, parameter_gradients="global")

        ranks = threads.run(len(parts), train)
        assert np.array_equal(np.concatenate([y for y, _ in ranks]), expected)
        assert np.array_equal(np.concatenate([grads.dx for _, grads in ranks]), expected_gradients.dx)
        assert all(np.array_equal(grads.dgamma, expected_gradients.dgamma) for _, grads in ranks)
        print(f"{name}: the same bits as one device holding all 32 images")

    alone = np.concatenate([cubn.forward_train(images[i : i + 2], cubn.BatchNormState(8))[0] for i in range(0, 32, 2)])
    error = np.abs(alone - expected).mean()
    print(f"without synchronisation: outputs off by {error:.2f} on average")
    assert error > 0.1


if __name__ == "__main__":
    main()
