"""It works in training and returns NaN in production: the four ways that happens, and what happens here."""

import numpy as np

import cubn


def main():
    rng = np.random.default_rng(0)
    state = cubn.BatchNormState(6)
    for _ in range(60):
        cubn.forward_train((3 * rng.standard_normal((16, 6, 4, 4)) + 2).astype(np.float32), state)
    x = (3 * rng.standard_normal((5, 6, 4, 4)) + 2).astype(np.float32)

    # A batch of one value per channel in training mode: an error that says what to do, and no state is touched.
    before = state.copy()
    try:
        cubn.forward_train(np.ones((1, 6), np.float32), state)
    except ValueError as error:
        print("one value per channel:", error)
    else:
        raise AssertionError("a batch of one was trained on")
    assert np.array_equal(state.running_var, before.running_var)
    assert np.isfinite(cubn.forward(np.ones((1, 6), np.float32), state)).all()

    # 16-bit data: float32 parameters and statistics, one rounding at the end.
    half = cubn.forward(x.astype(np.float16), state)
    assert half.dtype == np.float16 and state.running_var.dtype == np.float32
    assert np.array_equal(half, cubn.forward(x.astype(np.float16).astype(np.float32), state).astype(np.float16))
    print("float16 data: the float32 answer, rounded once")

    # Fine-tuning on frozen statistics: a forward with a backward that leaves them alone.
    y, saved = cubn.forward_frozen(x, state)
    gradients = cubn.backward(np.ones_like(y), saved)
    assert np.array_equal(y, cubn.forward(x, state))
    assert np.array_equal(state.running_mean, before.running_mean)
    print("frozen: gradients of shape", gradients.dx.shape, "and running statistics as they were")

    # Export: running statistics only, folded into the linear layer before the normalisation.
    weight, bias = rng.standard_normal((6, 10)).astype(np.float32), rng.standard_normal(6).astype(np.float32)
    features = rng.standard_normal((5, 10)).astype(np.float32)
    folded_weight, folded_bias = cubn.fold_into(weight, bias, state)
    folded = features @ folded_weight.T + folded_bias
    assert np.allclose(folded, cubn.forward(features @ weight.T + bias, state), rtol=1e-4, atol=1e-4)
    print("folded into the layer before: the same answer up to rounding")


if __name__ == "__main__":
    main()
