"""Kernel times on a CUDA device: what is run, by whom, and how it is timed.

A contestant's call is captured in a CUDA graph once for each of several sets of arrays, together at least three times
as large as the L2 cache, so that no call finds its arrays there; events around replays of the graph give the time,
contestants taking turns.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import cubn

from .workloads import MEMORY_FORMATS, MLP, RESNET50, VOLUMES, Workload

EPS, MOMENTUM = 1e-5, 0.1
CACHES = 3  # all sets of arrays, in L2 caches
WARM_UPS, TURNS = 2, 9

LAYERS = tuple(
    Workload(f"{C}@{H}² x {N}", (N, C, H, H), layout)
    for N in (256, 32)
    for layout in ("nchw", "nhwc")
    for C, H in RESNET50
)
OTHERS = (
    *(Workload(f"({N}, {C})", (N, C), "2-d") for N, C in (*MLP, (2_000_000, 3))),
    *(Workload(f"{C}@{H}³", (2, C, H, H, H), layout) for layout in ("nchw", "nhwc") for C, H in ((32, 128), *VOLUMES)),
)
WORKLOADS = LAYERS + OTHERS

Step = Callable[[], object]


class Operation(NamedTuple):
    """What is measured."""

    name: str
    floor: float  # bytes that must move where a channel stays on chip, in multiples of x's
    passes: float  # the same where x is read twice


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("forward_train", 2, 3),
        Operation("backward", 3, 5),
        Operation("forward", 2, 2),
        Operation("forward_train, add, relu", 3, 4),
        Operation("backward, add, relu", 4, 6),
    )
}


class Arrays(NamedTuple):
    """One set of arrays."""

    x: torch.Tensor
    dy: torch.Tensor
    residual: torch.Tensor
    y: torch.Tensor
    dx: torch.Tensor


class Parameters(NamedTuple):
    """gamma, beta and running statistics in float32."""

    gamma: torch.Tensor
    beta: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


def available() -> bool:
    """Whether there is a device and what drives it."""
    try:
        import cupy
    except ImportError:
        return False
    return torch.cuda.is_available() and cupy.cuda.is_available()


def require_device() -> None:
    """For asv's `setup`: skip the benchmark where there is no device."""
    if not available():
        raise NotImplementedError("needs a CUDA device and CuPy")


def arrays(workload: Workload, dtype: torch.dtype) -> Arrays:
    """Normal values in the workload's layout."""
    format = MEMORY_FORMATS[len(workload.shape)] if workload.layout == "nhwc" else torch.contiguous_format
    made = (torch.randn(workload.shape, device="cuda").to(dtype).contiguous(memory_format=format) for _ in range(3))
    x, dy, residual = made
    return Arrays(x, dy, residual, torch.empty_like(x), torch.empty_like(x))


def sets_of(workload: Workload, dtype: torch.dtype) -> list[Arrays]:
    """As many sets as it takes, and two at least."""
    bytes_of_a_set = 2 * dtype.itemsize * torch.Size(workload.shape).numel()  # the least that any operation moves
    caches = CACHES * torch.cuda.get_device_properties(0).L2_cache_size
    return [arrays(workload, dtype) for _ in range(max(2, -(-caches // bytes_of_a_set)))]


def parameters(C: int) -> Parameters:
    ones, zeros = torch.ones(C, device="cuda"), torch.zeros(C, device="cuda")
    return Parameters(ones, zeros, zeros.clone(), ones.clone())


# --- contestants: (operation, one set of arrays) -> the call, ready to be captured ------------------------------------


Contestant = Callable[[str, Arrays], Step]


def copy(operation: str, a: Arrays) -> Step:
    """As many bytes as must move, half of them read and half written."""
    elements = int(OPERATIONS[operation].floor * a.x.numel() / 2)
    source, target = a.x.new_empty(elements).normal_(), a.x.new_empty(elements)
    return lambda: target.copy_(source)


def with_cubn(operation: str, a: Arrays) -> Step:
    state = cubn.BatchNormState(a.x.shape[1], eps=EPS, momentum=MOMENTUM, like=a.x)
    options = {"residual": a.residual, "relu": True} if "add" in operation else {}
    if operation == "forward":
        return lambda: cubn.forward(a.x, state, out=a.y)
    if operation.startswith("forward_train"):
        return lambda: cubn.forward_train(a.x, state, out=a.y, **options)
    _, saved = cubn.forward_train(a.x, state, out=a.y, **options)
    return lambda: cubn.backward(a.dy, saved, out=a.dx)


def with_torch(operation: str, a: Arrays) -> Step:
    """torch's own kernels."""
    p = parameters(a.x.shape[1])

    def forward(training: bool) -> tuple[torch.Tensor, ...]:
        return torch.native_batch_norm(a.x, p.gamma, p.beta, p.mean, p.var, training, MOMENTUM, EPS)

    if operation == "forward":
        return lambda: forward(False)
    if operation == "forward_train":
        return lambda: forward(True)
    if operation == "forward_train, add, relu":
        return lambda: forward(True)[0].add_(a.residual).relu_()
    y, mean, invstd = forward(True)
    given = (a.x, p.gamma, p.mean, p.var, mean, invstd, True, EPS, [True, True, True])
    if operation == "backward":
        return lambda: torch.ops.aten.native_batch_norm_backward(a.dy, *given)
    y = y.add_(a.residual).relu_()
    stop = torch.ops.aten.threshold_backward
    return lambda: torch.ops.aten.native_batch_norm_backward(stop(a.dy, y, 0), *given)


def with_cudnn(operation: str, a: Arrays) -> Step:
    """cuDNN's, called as such: no flag or shape sends the call elsewhere."""
    p = parameters(a.x.shape[1])
    aten = torch.ops.aten

    def forward(training: bool) -> tuple[torch.Tensor, ...]:
        return aten.cudnn_batch_norm(a.x, p.gamma, p.beta, p.mean, p.var, training, MOMENTUM, EPS)

    if operation == "forward":
        return lambda: forward(False)
    if operation == "forward_train":
        return lambda: forward(True)
    if operation == "forward_train, add, relu":
        return lambda: forward(True)[0].add_(a.residual).relu_()
    y, mean, invstd, reserve = forward(True)
    given = (p.gamma, p.mean, p.var, mean, invstd, EPS, reserve)
    if operation == "backward":
        return lambda: aten.cudnn_batch_norm_backward(a.x, a.dy, *given)
    y = y.add_(a.residual).relu_()
    return lambda: aten.cudnn_batch_norm_backward(a.x, aten.threshold_backward(a.dy, y, 0), *given)


def with_compile(operation: str, a: Arrays) -> Step:
    """torch.compile of the layer as it is written in a model."""
    p = parameters(a.x.shape[1])
    adds, training = "add" in operation, operation != "forward"

    @torch.compile(dynamic=False, fullgraph=True)
    def layer(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.batch_norm(x, p.mean, p.var, gamma, beta, training, MOMENTUM, EPS)
        return torch.relu(y + residual) if adds else y

    given = [a.x, a.residual, p.gamma, p.beta]
    if not operation.startswith("backward"):
        return lambda: layer(*given)
    needed = given if adds else [a.x, p.gamma, p.beta]
    given = [g.detach().requires_grad_() for g in given]
    needed = [g for g, asked in zip(given, (True, adds, True, True), strict=True) if asked]
    y = layer(*given)
    return lambda: torch.autograd.grad(y, needed, a.dy, retain_graph=True)


CONTESTANTS: dict[str, Contestant] = {
    "copy": copy,
    "cubn": with_cubn,
    "torch": with_torch,
    "cudnn": with_cudnn,
    "compile": with_compile,
}


# --- timing -----------------------------------------------------------------------------------------------------------


class Captured(NamedTuple):
    """A graph and what keeps alive the memory it uses."""

    graph: torch.cuda.CUDAGraph
    steps: list[Step]


def captured(contestant: Contestant, operation: str, sets: list[Arrays]) -> Captured:
    """The call on every set, after warm-ups. All on one stream: autograd runs a backward on its forward's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps = [contestant(operation, a) for a in sets]
        for _ in range(WARM_UPS):
            for step in steps:
                step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for step in steps:
            step()
    return Captured(graph, steps)


def milliseconds(all_captured: list[Captured], calls: int, turns: int = TURNS) -> list[float]:
    """The median time of one of the calls in each graph, the graphs replayed in turns."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[list[float]] = [[] for _ in all_captured]
    for _ in range(WARM_UPS + turns):
        for one, row in zip(all_captured, times, strict=True):
            begin.record()
            one.graph.replay()
            end.record()
            end.synchronize()
            row.append(begin.elapsed_time(end) / calls)
    return [statistics.median(row[WARM_UPS:]) for row in times]


def measure(
    workload: Workload, dtype: torch.dtype, operation: str, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds by contestant; and why others have none: what their library says."""
    sets = sets_of(workload, dtype)
    graphs, refused = {}, {}
    for name in names:
        try:
            graphs[name] = captured(CONTESTANTS[name], operation, sets)
        except Exception as error:
            if name in ("copy", "cubn"):
                raise
            refused[name] = str(error).partition("\n")[0][:200]
    return dict(zip(graphs, milliseconds(list(graphs.values()), len(sets)), strict=True)), refused
