"""Kernels over channels, and what other kernels do to some channels: statistics, coefficient tables, updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cubn.backends.cpu import channels
from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.simd import LANES, Element, get

Function = Callable[[int, int], None]

CHANNELS = OFFSET["channels"]
COEFFICIENTS, COEFFICIENT_ROW = OFFSET["coefficients"], OFFSET["coefficient_row"]
COUNT, MEAN, M2, VAR, INVSTD = (OFFSET[name] for name in ("count", "mean", "m2", "var", "invstd"))
FIRST, SECOND = OFFSET["first"], OFFSET["second"]
GAMMA, BETA, DGAMMA, DBETA = (OFFSET[name] for name in ("gamma", "beta", "dgamma", "dbeta"))
KEPT_GAMMA, KEPT_BETA = OFFSET["kept_gamma"], OFFSET["kept_beta"]
OLD_MEAN, OLD_VAR, NEW_MEAN, NEW_VAR = (OFFSET[name] for name in ("old_mean", "old_var", "new_mean", "new_var"))
CODE, STRIDE = OFFSET["gamma_code"] - GAMMA, OFFSET["gamma_stride"] - GAMMA  # behind any vector's address
EPS, MOMENTUM, CUMULATIVE, DDOF = (OFFSET[name] for name in ("eps", "momentum", "cumulative", "ddof"))
TRACKED, SKIPPED = OFFSET["tracked"], OFFSET["skipped"]


@jit
def vector(p, name, c):  # type: ignore[no-untyped-def]
    """A caller's vector from channel c on: address, stride, code."""
    stride = get(p + name + STRIDE)
    return get(p + name) + c * stride, stride, get(p + name + CODE)


@jit
def sums(p, c):  # type: ignore[no-untyped-def]
    """Roots, or sums, from channel c on."""
    return get(p + FIRST) + 8 * c, get(p + SECOND) + 8 * c


def table_of(element: Element) -> Any:
    """For kernels: the table's entries of some channels, from their mean and invstd."""
    of_channels, acc = channels.coefficients(element.acc), element.acc_size

    @jit
    def tabulate(p, c, lanes):  # type: ignore[no-untyped-def]
        table = get(p + COEFFICIENTS) + c * acc, get(p + COEFFICIENT_ROW)
        mean, invstd = get(p + MEAN) + 8 * c, get(p + INVSTD) + 8 * c
        of_channels(table, mean, invstd, vector(p, GAMMA, c), vector(p, BETA, c), lanes)

    return tabulate


def gradient_table_of(element: Element) -> Any:
    """For kernels: k1 and k2 of some channels, from their sums."""
    of_channels, acc = channels.gradient_coefficients(element.acc), element.acc_size

    @jit
    def tabulate(p, c, lanes):  # type: ignore[no-untyped-def]
        table = get(p + COEFFICIENTS) + c * acc, get(p + COEFFICIENT_ROW)
        of_channels(table, sums(p, c), get(get(p + COUNT)), get(p + INVSTD) + 8 * c, lanes)

    return tabulate


@jit
def finish(p, c, roots, stride, count, lanes):  # type: ignore[no-untyped-def]
    """Statistics of some channels from their roots."""
    at = 8 * c
    to = get(p + MEAN) + at, get(p + M2) + at, get(p + VAR) + at, get(p + INVSTD) + at
    channels.statistics(roots, stride, count, p + EPS, to, lanes)


@jit
def finish_root(p, c, lanes):  # type: ignore[no-untyped-def]
    """`finish`, where the roots are vectors."""
    finish(p, c, sums(p, c), 8, get(get(p + COUNT)), lanes)


@jit
def widen_running(p, c, lanes):  # type: ignore[no-untyped-def]
    """Mean, var and invstd of some channels from running statistics."""
    at = 8 * c
    to = get(p + MEAN) + at, get(p + VAR) + at, get(p + INVSTD) + at
    channels.frozen_statistics(vector(p, OLD_MEAN, c), vector(p, OLD_VAR, c), p + EPS, to, lanes)


def for_all(first: Any, second: Any = None) -> Function:
    """One or two functions of (parameters, first channel, channels) over all channels, 16 at a time."""
    at_once = LANES

    def one(p, worker):  # type: ignore[no-untyped-def]
        for c in range(0, get(p + CHANNELS), at_once):
            first(p, c, min(get(p + CHANNELS) - c, at_once))

    def two(p, worker):  # type: ignore[no-untyped-def]
        for c in range(0, get(p + CHANNELS), at_once):
            first(p, c, min(get(p + CHANNELS) - c, at_once))
            second(p, c, min(get(p + CHANNELS) - c, at_once))

    return two if second else one


def update(code: int) -> Any:
    """Running statistics stored in float32 (code 3) or float64 (4), and both counters."""
    of_channels = channels.update[code]

    @jit
    def update_running(p, c, lanes):  # type: ignore[no-untyped-def]
        at = 8 * c
        of_channels(
            vector(p, OLD_MEAN, c),
            vector(p, OLD_VAR, c),
            vector(p, NEW_MEAN, c),
            vector(p, NEW_VAR, c),
            (get(p + MEAN) + at, get(p + M2) + at),
            get(get(p + COUNT)),
            get(p + DDOF),
            p + MOMENTUM,
            get(p + CUMULATIVE),
            (get(p + TRACKED) + at, get(p + SKIPPED) + at),
            lanes,
        )

    return update_running


@jit
def keep(p, c, lanes):  # type: ignore[no-untyped-def]
    """gamma and beta of some channels, where they are to be kept."""
    if get(p + KEPT_GAMMA):
        channels.keep(vector(p, GAMMA, c), get(p + KEPT_GAMMA) + 8 * c, lanes)
    if get(p + KEPT_BETA):
        channels.keep(vector(p, BETA, c), get(p + KEPT_BETA) + 8 * c, lanes)


@jit
def gradients(p, c, lanes):  # type: ignore[no-untyped-def]
    """dgamma and dbeta of some channels, each in its own dtype."""
    dgamma, dbeta = vector(p, DGAMMA, c), vector(p, DBETA, c)
    channels.parameter_gradients(sums(p, c), get(p + INVSTD) + 8 * c, dgamma, dbeta, lanes)
