"""What a device would be asked to compile, without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, cast

from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.device import Device
from cubn.backends.cuda.plan import Launch, Limits
from cubn.errors import BackendUnavailable

USUAL = {
    limits.capability: limits
    for limits in (
        Limits(40, 64 << 10, (7, 5), 4 << 20),  # T4
        Limits(108, 163 << 10, (8, 0), 40 << 20),  # A100
        Limits(84, 99 << 10, (8, 6), 6 << 20),  # A40, RTX A6000
        Limits(142, 99 << 10, (8, 9), 96 << 20),  # L40S
        Limits(132, 227 << 10, (9, 0), 50 << 20),  # H100, H200
        Limits(148, 227 << 10, (10, 0), 126 << 20),  # B200
        Limits(170, 99 << 10, (12, 0), 96 << 20),  # RTX 5090
    )
}
"""Devices that stand for all of a compute capability: others differ in multiprocessors, and in few of the kernels."""


def usual(architecture: int) -> Limits:
    """Those of a device of an architecture, as 90."""
    try:
        return USUAL[divmod(architecture, 10)]
    except KeyError:
        known = ", ".join(str(10 * major + minor) for major, minor in USUAL)
        raise BackendUnavailable(f"cubn: nothing is known of sm_{architecture}. Choose one of {known}") from None


class _Planned:
    """As much of a device as calls are prepared with."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.launches: list[Launch] = []

    def compile(self, launches: Sequence[Launch]) -> None:
        self.launches += launches

    def empty(self, shape: tuple[int, ...], dtype: str) -> NoReturn:
        raise NotImplementedError("nothing is computed here")

    zeros = empty


def launches_of(limits: Limits, prepare: Callable[[CudaBackend], None]) -> list[Launch]:
    """Those of the calls that are prepared on a backend of a device with these limits."""
    device = _Planned(limits)
    prepare(CudaBackend(cast(Device, device)))
    return device.launches
