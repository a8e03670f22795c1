"""A network in NumPy, with a batch norm in NumPy or cubn's between BLAS's matrix products. Imports no torch: the
process is that of someone who has none.
"""

from typing import Any

import numpy as np

import cubn
from cubn.gradients import Gradients

from .shares import Step, Timed, TimedStep

BATCH, WIDTH, LAYERS = 256, 1024, 4
Array = np.ndarray


class Plain:
    """Batch norm as one writes it in NumPy, with cubn's names."""

    @staticmethod
    def forward_train(x: Array, state: cubn.BatchNormState, relu: bool = False) -> tuple[Array, tuple[object, ...]]:
        mean = x.mean(axis=0)
        d = x - mean
        var = np.square(d).mean(axis=0)
        invstd = 1 / np.sqrt(var + np.float32(state.eps))
        xhat = d * invstd
        y = xhat * state.gamma + state.beta
        w = np.float32(state.momentum)
        state.running_mean += w * (mean - state.running_mean)
        state.running_var += w * (var * np.float32(len(x) / (len(x) - 1)) - state.running_var)
        if relu:
            np.maximum(y, 0, out=y)
        return y, (state.gamma, invstd, xhat, y if relu else None)

    @staticmethod
    def backward(dy: Array, saved: tuple[Any, ...]) -> Gradients[Array]:
        gamma, invstd, xhat, y = saved
        if y is not None:
            dy = dy * (y > 0)
        dgamma, dbeta = (dy * xhat).sum(axis=0), dy.sum(axis=0)
        count = np.float32(len(dy))
        dx = (dy - dbeta / count - xhat * (dgamma / count)) * (gamma * invstd)
        return Gradients(dx, dgamma, dbeta, None)


class Nothing:
    """No batch norm, with cubn's names."""

    @staticmethod
    def forward_train(x: Array, state: cubn.BatchNormState, relu: bool = False) -> tuple[Array, None]:
        return x, None

    @staticmethod
    def backward(dy: Array, saved: None) -> Gradients[Array]:
        return Gradients(dy, None, None, None)


class Perceptron:
    """Four times a matrix product, batch norm and ReLU: the last two in one call each way, or the ReLU by NumPy."""

    def __init__(self, calls: Any, fused: bool) -> None:
        rng = np.random.default_rng(0)
        self.calls, self.fused = calls, fused
        scale = np.float32(np.sqrt(2 / WIDTH))  # keeps what no batch norm rescales
        self.weights = [rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) * scale for _ in range(LAYERS)]
        self.states = [cubn.BatchNormState(WIDTH) for _ in range(LAYERS)]
        self.x, self.target = rng.standard_normal((2, BATCH, WIDTH), dtype=np.float32)

    def step(self) -> list[tuple[Array, Gradients[Array]]]:
        """A training step but for the update: by layer, last first, the gradients of the weights and of batch norm."""
        h, kept = self.x, []
        for weight, state in zip(self.weights, self.states, strict=True):
            y, saved = self.calls.forward_train(h @ weight, state, relu=self.fused)
            if not self.fused:
                np.maximum(y, 0, out=y)
            kept.append((h, weight, y, saved))
            h = y
        dh, gradients = (h - self.target) / np.float32(h.size), []
        for h, weight, y, saved in reversed(kept):
            if not self.fused:
                dh = dh * (y > 0)
            of_norm = self.calls.backward(dh, saved)
            gradients.append((h.T @ of_norm.dx, of_norm))
            dh = of_norm.dx @ weight.T
        return gradients


def steps() -> dict[str, Step]:
    of_all = {
        "numpy": Perceptron(Plain, fused=False),
        "cubn": Perceptron(cubn, fused=False),
        "fused": Perceptron(cubn, fused=True),
        "none": Perceptron(Nothing, fused=False),
        "bare": Perceptron(Nothing, fused=True),
    }
    return {name: one.step for name, one in of_all.items()}


def timed_steps() -> dict[str, TimedStep]:
    """Steps whose calls are timed: of batch norm alone, and with the ReLU."""
    of_all = {}
    for name, calls in {"numpy": Plain, "cubn": cubn}.items():
        for what, fused in {name: False, f"{name} + ReLU": True}.items():
            timed = Timed(calls)
            of_all[what] = TimedStep(Perceptron(timed, fused).step, timed)
    return of_all
