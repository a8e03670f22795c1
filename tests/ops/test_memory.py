"""Nothing of the input's size is kept or needed besides the outputs."""

import tracemalloc

import numpy as np
import pytest

import cubn

SHAPES = [((8, 64, 56, 56), 1), ((8, 256, 14, 14), 1), ((8, 56, 56, 64), -1), ((4096, 256), 1)]


def peak_of(call):
    """Bytes allocated at the worst moment of a call, beyond what was there before it, and what it returned."""
    tracemalloc.start()
    try:
        result = call()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", [{}, {"relu": True}], ids=["plain", "relu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_memory_beyond_inputs_and_outputs(shape, axis, options):
    cubn.set_num_threads(2)
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    state = cubn.BatchNormState(shape[axis], channel_axis=axis)
    allowed = (1 << 20) + 64 * shape[0] * shape[axis]

    def train():
        return cubn.forward_train(x, state, **options)

    dy = np.ones_like(x)
    cubn.backward(dy, train()[1])  # these compile, and make the plans
    cubn.forward(x, state, **options)
    peak, (y, saved) = peak_of(train)
    assert y.nbytes <= peak < y.nbytes + allowed
    peak, gradients = peak_of(lambda: cubn.backward(dy, saved))
    assert gradients.dx.nbytes <= peak < gradients.dx.nbytes + allowed
    peak, y = peak_of(lambda: cubn.forward(x, state, **options))
    assert y.nbytes <= peak < y.nbytes + allowed
