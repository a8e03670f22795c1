"""CUDA graphs: captured once after a warm-up, replayed on new values, with counters that count every replay."""

import numpy as np
import pytest

import cubn
from tests.gpu import device_arrays
from tests.ops import arrays

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")

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


@pytest.mark.parametrize("name", SHAPES)
def test_a_graph_computes_what_was_recorded(library, name):
    """Each replay gives what the CPU gives for the batch it finds in x, and moves the state on."""
    shape = SHAPES[name]
    x, dy = (library.carry(store) for store in (np.zeros(shape, np.float32), batches(shape)[0]))
    state = cubn.BatchNormState(shape[1], like=x)
    (y, grads, inferred), replay = library.graph_of(lambda: step(x, dy, state), WARM_UPS)
    host_dy, plain = batches(shape)[0], cubn.BatchNormState(shape[1])
    for _ in range(WARM_UPS):
        step(np.zeros(shape, np.float32), host_dy, plain)
    bystander = cupy.full(1 << 20, 7, np.int32)  # memory the graph must not know of
    for number, batch in enumerate(batches(shape), 1):
        library.copy(x, library.carry(batch))
        replay()
        expected_y, expected_grads, expected_inferred = step(batch, host_dy, plain)
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
