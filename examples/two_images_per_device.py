"""Two images per device: per-device statistics are noise, synchronised ones are the whole batch's, bit for bit.

32 images are shared among devices. torch's batch norm on each of them normalises by the statistics of its own few
images; cubn's, with `comm=`, by those of all 32, to the bit, whether the shares are even, uneven or empty. The devices
are threads here. With MPI they are processes, and the communicator is MPI.COMM_WORLD; nothing else changes.

    python examples/two_images_per_device.py --figure docs/figures/two_images_per_device.png
"""

import argparse
from itertools import pairwise

import numpy as np
import torch

import cubn
from cubn.sync import threads

IMAGES = 32


def batch():
    """Images, of which each has its own brightness, and a gradient of the loss."""
    rng = np.random.default_rng(0)
    levels = rng.normal(0, 1, (IMAGES, 1, 1, 1))
    images = rng.normal(levels, 1, (IMAGES, 8, 20, 20)).astype(np.float32)
    return images, rng.normal(0, 1, images.shape).astype(np.float32)


def synchronised(images, gradient, edges):
    """Outputs and gradients of devices that hold the images between these edges."""
    parts = [slice(*edge) for edge in pairwise(edges)]

    def train(comm):
        mine = parts[comm.rank]
        y, saved = cubn.forward_train(images[mine], cubn.BatchNormState(8), comm=comm)
        return y, cubn.backward(gradient[mine], saved, parameter_gradients="global")

    ranks = threads.run(len(parts), train)
    return np.concatenate([y for y, _ in ranks]), [gradients for _, gradients in ranks]


def alone(images, each):
    """Outputs of torch's batch norm on devices with so many images each."""
    shares = torch.from_numpy(images).split(each)
    return np.concatenate([torch.nn.functional.batch_norm(x, None, None, training=True) for x in shares])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", metavar="PATH", help="draw it, as SVG or PNG")
    arguments = parser.parse_args()
    images, gradient = batch()
    expected, saved = cubn.forward_train(images, cubn.BatchNormState(8))
    of_whole = cubn.backward(gradient, saved)

    for name, edges in (
        ("16 devices, two images each", range(0, 33, 2)),
        ("5 devices, uneven", (0, 1, 4, 5, 20, 32)),
        ("4 devices, two of them empty", (0, 0, 7, 7, 32)),
    ):
        y, gradients = synchronised(images, gradient, edges)
        assert np.array_equal(y, expected)
        assert np.array_equal(np.concatenate([each.dx for each in gradients]), of_whole.dx)
        assert all(np.array_equal(each.dgamma, of_whole.dgamma) for each in gradients)
        print(f"{name}: the same bits as one device holding all {IMAGES} images")

    shares = [2**i for i in range(6)]
    errors = {each: float(np.sqrt(np.mean((alone(images, each) - expected) ** 2))) for each in shares}
    zeros = {each: np.abs(synchronised(images, gradient, range(0, 33, each))[0] - expected).max() for each in shares}
    assert errors[2] > 0.1 and not any(zeros.values())
    if arguments.figure:
        draw(errors, zeros, arguments.figure)
    print(f"without synchronisation, in torch: outputs off by {errors[2]:.2f} (RMS; they have a deviation of 1)")


def draw(errors, zeros, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*errors.items(), strict=True), "o-", color="#d55e00", label="torch: each device by itself")
    axes.plot(*zip(*zeros.items(), strict=True), "s-", color="#0072b2", label="cubn, comm=: the whole batch's bits")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(errors), [str(each) for each in errors])
    axes.set(xlabel=f"images per device, of {IMAGES} in the batch", ylabel="error of the outputs (RMS)")
    axes.set_title("One batch over many devices: how far outputs are from one device's", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
