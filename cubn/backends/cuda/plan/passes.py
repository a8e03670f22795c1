"""Normalising and the input gradient, element by element; and kernels with a thread for every channel."""

from __future__ import annotations

import functools
import math

from cubn._types import Extents
from cubn.backends.cuda.plan.launch import (
    ELEMENTS,
    OCTET,
    THREADS,
    WARP,
    WAVES,
    Fields,
    Launch,
    Layout,
    Limits,
    Options,
    acc_of,
    flags,
    option,
    power_above,
    sizes,
)

STEPS = 4  # rounds of an elementwise thread; to be measured
RENORMALISING = ("renormalise", "renormalised_gradients")
NARROW_INDEX = 1 << 31  # elements from which 32 bits do not count them


@functools.lru_cache(1024)
def elementwise(extents: Extents, layout: Layout, dtype: str, options: Options, limits: Limits) -> Launch:
    """Normalise or the input gradient, over an array that is not empty; `layout` as from `elementwise_layout`."""
    N, C, S = extents
    common = (*option(ELEMENT=ELEMENTS[dtype]), *flags(options))
    if layout == "nhwc" and C % OCTET == 0:
        return _channels(extents, common, limits)
    if layout == "nchw" and S % OCTET == 0:
        return _rows(extents, common, 0, limits)
    if layout != "strided":  # octets run over the ends of rows
        rows = extents if layout == "nchw" else Extents(N * S, C, 1)
        return _rows(rows, common, 2 if rows.S >= OCTET else 1, limits)
    return Launch(
        "apply_strided", common, -(-math.prod(extents) // (OCTET * THREADS)), 0, tuple(sizes(extents).items())
    )


def _steps(octets: int, limits: Limits) -> int:
    """Rounds of a thread: more than one where blocks are plenty."""
    return STEPS if octets > 2 * STEPS * WAVES * THREADS * limits.multiprocessors else 1


def _divisor(name: str, by: int, bits: int) -> Fields:
    """n // by, n < 2**bits, as the upper half of a product; see kernels/parameters.cuh."""
    if by == 1:
        return {f"{name}.shift": -1}
    shift = (by - 1).bit_length() - 1
    multiplier = -(-(1 << bits + shift + 1) // by)  # below 2**(bits + 1)
    return {f"{name}.multiplier": multiplier - (multiplier >> 63 << 64), f"{name}.shift": shift}


def _rows(extents: Extents, common: tuple[str, ...], crossing: int, limits: Limits) -> Launch:
    elements = math.prod(extents)
    octets = -(-elements // OCTET)
    steps = _steps(octets, limits)
    index = "unsigned" if elements < NARROW_INDEX else "size_t"
    options = (*common, *option(CROSSING=crossing, INDEX=index))
    grid = -(-octets // (steps * THREADS))
    bits = 31 if elements < NARROW_INDEX else 63
    divisors = {**_divisor("over_positions", extents.S, bits), **_divisor("over_channels", extents.C, bits)}
    fields = {**sizes(extents), **divisors, "steps": steps}
    return Launch("apply_rows", options, grid, 0, tuple(fields.items()), octets="linear" if crossing else "nchw")


def _channels(extents: Extents, common: tuple[str, ...], limits: Limits) -> Launch:
    N, C, S = extents
    lanes = min(WARP, power_above(C // OCTET))
    across = -(-C // (OCTET * lanes))
    at_once = THREADS // lanes
    rounds = -(-N * S // at_once)
    steps = 1
    while steps < 16 and -(-rounds // (2 * steps)) * across >= 2 * WAVES * limits.multiprocessors:
        steps *= 2
    fields = {**sizes(extents), "lanes": lanes, "steps": steps, "blocks_across": across}
    return Launch("apply_channels", common, -(-rounds // steps) * across, 0, tuple(fields.items()), octets="nhwc")


@functools.lru_cache(1024)
def channelwise(kernel: str, C: int, dtype: str = "float32") -> Launch:
    """A kernel with a thread for every channel."""
    file, options = ("renormalise", ()) if kernel in RENORMALISING else ("channelwise", option(ACC=acc_of(dtype)))
    return Launch(kernel, options, -(-C // THREADS), 0, (("channels", C),), file=file)
