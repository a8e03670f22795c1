"""What is measured: the array shapes everybody compares, and each operation as cubn and torch would run it on them."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import cubn

BATCH = 32
THREADS = 2
EPS, MOMENTUM = 1e-5, 0.1


class Workload(NamedTuple):
    """A float32 array, unless another type is asked for: (N, C, *extent), in memory channel-first or channel-last."""

    name: str
    shape: tuple[int, ...]
    layout: str


RESNET50 = (  # the distinct layers: channels, extent
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
    (512, 14),
    (512, 7),
    (2048, 7),
)
MLP = ((128, 512), (1024, 1024), (4096, 1024), (4096, 4096), (65536, 64), (100000, 32))
VOLUMES = ((32, 64), (64, 64), (128, 32), (320, 8))  # N = 2: channels, extent

WORKLOADS = (
    *(Workload(f"{C}@{H}²", (BATCH, C, H, H), layout) for layout in ("nchw", "nhwc") for C, H in RESNET50),
    *(Workload(f"({N}, {C})", (N, C), "2-d") for N, C in MLP),
    *(Workload(f"{C}@{H}³", (2, C, H, H, H), layout) for layout in ("nchw", "nhwc") for C, H in VOLUMES),
)

MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def random(workload: Workload, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values in the workload's layout."""
    x = torch.randn(workload.shape, generator=torch.Generator().manual_seed(0))
    format = MEMORY_FORMATS[x.ndim] if workload.layout == "nhwc" else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=format)


class Arrays(NamedTuple):
    """What every contestant computes on, and where results go."""

    x: torch.Tensor
    dy: torch.Tensor
    y: torch.Tensor
    dx: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    mean: torch.Tensor  # the batch's
    invstd: torch.Tensor


def arrays(workload: Workload, dtype: torch.dtype = torch.float32) -> Arrays:
    x = random(workload, dtype)
    ones, zeros = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    _, mean, invstd = torch.native_batch_norm(x, ones, zeros, None, None, True, MOMENTUM, EPS)
    affine_and_running = (ones, zeros, zeros.clone(), ones.clone())
    return Arrays(x, torch.randn_like(x), torch.empty_like(x), torch.empty_like(x), *affine_and_running, mean, invstd)


class Operation(NamedTuple):
    """One operation, ready to be called: by cubn and by torch."""

    cubn: Callable[[], object]
    torch: Callable[[], object]


def operations(a: Arrays) -> dict[str, Operation]:
    """Every measured operation; and, the same on both sides, "copy" and "read" (x once)."""
    state = cubn.BatchNormState(a.x.shape[1], eps=EPS, momentum=MOMENTUM, like=a.x)
    _, saved = cubn.forward_train(a.x, state, out=a.y)
    memory = a.x.as_strided((a.x.numel(),), (1,)).view(torch.float32)
    mean, invstd = torch.empty_like(a.mean), torch.empty_like(a.invstd)

    def torch_forward(training: bool) -> object:
        given = (a.x, a.gamma, a.beta, a.running_mean, a.running_var, training, MOMENTUM, EPS)
        return torch.native_batch_norm(*given, out=(a.y, mean, invstd))

    def torch_backward() -> object:
        given = (a.dy, a.x, a.gamma, a.running_mean, a.running_var, a.mean, a.invstd, True, EPS, [True, True, True])
        return torch.ops.aten.native_batch_norm_backward(*given)

    return {
        "copy": Operation(lambda: a.y.copy_(a.x), lambda: a.y.copy_(a.x)),
        "read": Operation(memory.sum, memory.sum),
        "forward_train": Operation(lambda: cubn.forward_train(a.x, state, out=a.y), lambda: torch_forward(True)),
        "forward": Operation(lambda: cubn.forward(a.x, state, out=a.y), lambda: torch_forward(False)),
        "moments": Operation(lambda: cubn.moments(a.x), lambda: torch.var_mean(a.x, all_but_channels(a.x))),
        "backward": Operation(lambda: cubn.backward(a.dy, saved), torch_backward),
        "backward into dx": Operation(lambda: cubn.backward(a.dy, saved, out=a.dx), torch_backward),
    }


def all_but_channels(x: torch.Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


SETTLE, COUNT = 0.02, 0.01  # seconds of a turn


def alternate(calls: Sequence[Callable[[], object]], turns: int = 7) -> list[float]:
    """The time of each call in seconds, the calls taking turns: the median of its quietest turn.

    In its turn a call is repeated for 20 ms that do not count, then for 10 ms that do, and once at least either way:
    torch's threads spin on the processors for some 16 ms after torch's last call, and what they hold up then is not
    what a program that uses one library sees. In some turns the system keeps both threads of a call on one processor,
    and each call then takes the milliseconds of a time slice; so the turn with the least median counts, on all sides.
    """
    medians: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for call, row in zip(calls, medians, strict=True):
            _repeated(call, SETTLE)
            row.append(statistics.median(_repeated(call, COUNT)))
    return [min(row) for row in medians]


def _repeated(call: Callable[[], object], seconds: float) -> list[float]:
    """The times of calls one after another, until so many seconds have passed."""
    now = time.perf_counter()
    end, times = now + seconds, []
    while not times or now < end:
        begin = now
        call()
        now = time.perf_counter()
        times.append(now - begin)
    return times


def use_threads(n: int = THREADS) -> None:
    """The same number of threads on both sides."""
    torch.set_num_threads(n)
    cubn.set_num_threads(n)
