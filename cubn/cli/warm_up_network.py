"""`python -m cubn warm-up resnet50`: the kernels of a network's batch norms, for this machine or a device elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import cubn
from cubn import _ahead
from cubn._ahead import Calls
from cubn.backends.cores import cores
from cubn.cli.networks import NETWORKS
from cubn.cli.warm_up import in_processes, said


class Kind(NamedTuple):
    """Layers that are alike."""

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    residual: bool
    relu: bool


def kinds(network: str, batch: int, image: int, dtypes: Sequence[str], channels_last: bool, fuse: bool) -> list[Kind]:
    """Those of a network. Unless it fuses, residuals and ReLUs are none of its batch norms' business."""
    found = [
        Kind((batch, layer.channels, layer.size, layer.size), dtype, channels_last, *(fuse and on for on in layer[2:]))
        for dtype in dtypes
        for layer in NETWORKS[network](image)
    ]
    return list(dict.fromkeys(found))


def warm_up_network(
    network: str,
    batch: int,
    image: int,
    dtypes: Sequence[str],
    channels_last: bool,
    fuse: bool,
    device: str,
    architecture: int | None,
    processes: int,
) -> int:
    """Fill the cache and say what was compiled; 0 if all of it is kept."""
    wanted = kinds(network, batch, image, dtypes, channels_last, fuse)
    if device == "cpu" and not architecture:
        return in_processes(make, wanted, processes)
    return _for_cuda(wanted, int(device.partition(":")[2] or 0), architecture)


def make(kind: Kind) -> list[str]:
    """Prepare for calls on the CPU; the names of the kernels that were compiled for it."""
    from cubn.backends.cpu.compile import compiled_here

    before = len(compiled_here)
    shape, dtype, channels_last, residual, relu = kind
    cubn.warm_up(shape, dtype=dtype, channels_last=channels_last, residual=residual, relu=relu)
    return compiled_here[before:]


def _for_cuda(wanted: Sequence[Kind], index: int, architecture: int | None) -> int:
    """For a device that is here, or any of an architecture: that needs a compiler only."""
    from cubn.backends.cuda import planned
    from cubn.backends.cuda.cupy_device import limits_of, machine_code

    limits = planned.usual(architecture) if architecture else limits_of(index)
    code = machine_code(limits.capability)

    def prepare(backend: Any) -> None:
        for shape, dtype, channels_last, *fused in wanted:
            _ahead.prepare(backend, [_ahead.layer(shape, 1, channels_last, dtype)], Calls(*fused))

    begin = time.monotonic()
    code.make_ready(planned.launches_of(limits, prepare))
    by = f"{cores()} thread{'s' * (cores() > 1)}, for {len(wanted)} kinds of layers on sm_{code.compiler.architecture}"
    return said(len(code.compiled_here), time.monotonic() - begin, by, code.lost())
