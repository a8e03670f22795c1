"""One update of a module's running statistics in each step, where the device counts: as on the host, to the bit."""

import functools

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import cubn.torch  # noqa: E402
from tests.torch.training import assert_same, batches, statistics, step  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("torch_device")]


def run(device, wrap=lambda layer: layer):
    """y and dx of each step, and the statistics after the last."""
    layer = cubn.torch.BatchNorm1d(6).to(device)
    forward = wrap(layer)
    seen = [tensor.cpu() for x in batches() for tensor in step(forward, x.to(device))]
    return [*seen, *(buffer.cpu() for buffer in statistics(layer).values())]


def graphed(layer):
    """Captured after a warm-up; each call replays the graph."""
    example = batches(1)[0].cuda().requires_grad_()
    with cubn.torch.keep_statistics(layer):
        return torch.cuda.make_graphed_callables(layer, (example,))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    """Autograd computes again in a thread of its own."""
    again = functools.partial(functools.partial, checkpoint, use_reentrant=use_reentrant)
    assert_same(run("cuda", again), run("cuda"))


def test_the_warm_up_of_a_graph_leaves_no_trace():
    assert_same(run("cuda", graphed), run("cuda"))


def test_statistics_are_those_of_the_host():
    assert_same(run("cuda")[-4:], run("cpu")[-4:])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_micro_batches_are_pooled_as_on_the_host(momentum):
    layers = [cubn.torch.BatchNorm1d(6, momentum=momentum).to(device) for device in ("cuda", "cpu")]
    for layer in layers:
        layer(batches(1)[0].to(layer.weight.device))
        with cubn.torch.accumulate(layer):
            for x in batches():
                layer(x.to(layer.weight.device))
    on_device, on_host = (list(statistics(layer.cpu()).values()) for layer in layers)
    assert_same(on_device, on_host)
