"""CUDA graphs: captured once after a warm-up, replayed on new values, with counters that count every replay."""

import numpy as np
import pytest

import cubn
from tests.gpu import device_arrays
from tests.ops import arrays

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")
torch = pytest.importorskip("torch")

SHAPES = {
    "resident": (8, 16, 28, 28),
    "two passes": (300, 2, 112, 112),
    "resident, channels": (64, 96),
    "channels": (70001, 8),
}
WARM_UPS, REPLAYS = 2, 3


def batches(shape):
    return [arrays.normal(np.random.default_rng(seed), shape, "float32", centre=seed) for seed in range(REPLAYS)]


def step(x, dy, state):
    y, saved = cubn.forward_train(x, state, residual=dy, relu=True)
    return y, cubn.backward(dy, saved), cubn.forward(x, state)


def check_replays(shape, x, dy, state, outputs, replay):
    """Each replay gives what the CPU gives for the batch it finds in x, and moves the state on."""
    host_dy = device_arrays.store_of(dy)
    plain = cubn.BatchNormState(shape[1])
    for _ in range(WARM_UPS):
        step(np.zeros(shape, np.float32), host_dy, plain)
    bystander = cupy.full(1 << 20, 7, np.int32)  # memory the graph must not know of
    for number, batch in enumerate(batches(shape), 1):
        replay(batch)
        expected = step(batch, host_dy, plain)
        (y, grads, inferred), (expected_y, expected_grads, expected_inferred) = outputs, expected
        for what, got, wanted in (
            ("y", y, expected_y),
            ("inference", inferred, expected_inferred),
            *(
                (f"d{name}", getattr(grads, f"d{name}"), getattr(expected_grads, f"d{name}"))
                for name in ("x", "gamma", "beta", "residual")
            ),
            *(
                (name, getattr(state, name), getattr(plain, name))
                for name in ("running_mean", "running_var", "tracked")
            ),
        ):
            arrays.assert_same(device_arrays.store_of(got), arrays.store_of(wanted), f"{what} of replay {number}")
        assert device_arrays.store_of(state.tracked).tolist() == [WARM_UPS + number] * shape[1]
    assert (bystander == 7).all()


@pytest.mark.usefixtures("torch_device")
@pytest.mark.parametrize("name", SHAPES)
def test_a_graph_of_torch_computes_what_was_recorded(name):
    shape = SHAPES[name]
    x, dy = torch.zeros(shape, device="cuda"), device_arrays.to_torch(batches(shape)[0])
    state = cubn.BatchNormState(shape[1], like=x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step(x, dy, state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(x, dy, state)

    def replay(batch):
        x.copy_(torch.from_numpy(batch))
        graph.replay()

    check_replays(shape, x, dy, state, outputs, replay)


@pytest.mark.parametrize("name", SHAPES)
def test_a_graph_of_cupy_computes_what_was_recorded(name):
    """CuPy's graphs do not own memory: a pool that nothing else uses, warmed up and kept, does."""
    shape = SHAPES[name]
    x, dy = cupy.zeros(shape, np.float32), device_arrays.to_cupy(batches(shape)[0])
    state = cubn.BatchNormState(shape[1], like=x)
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        for _ in range(WARM_UPS):
            step(x, dy, state)
        stream.begin_capture()
        outputs = step(x, dy, state)
        graph = stream.end_capture()

    def replay(batch):
        with stream:
            x.set(batch)
            graph.launch(stream)
        stream.synchronize()

    check_replays(shape, x, dy, state, outputs, replay)
