"""My network's output for one sample changes with the batch size. Is it batch norm?

A residual tower (19 blocks of 3x3 convolutions, 64 channels, inference) and a linear policy head, in NumPy. Row 0 goes
through it alone and with 62 others. With one matrix product per sample the output's bits are the same. With one product
for the whole batch the BLAS library may round in another way for other numbers of rows, and the first layer whose bits
part is a convolution or the head, never a normalisation.
"""

import numpy as np

import cubn

CHANNELS, BLOCKS, EXTENT, MOVES = 64, 19, (7, 6), 7


def patches(x):
    """The 3x3 neighbourhoods of (N, C, H, W): (N, H * W, 9 C)."""
    N, C, H, W = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(N, H * W, C * 9)


def convolve(x, weight, whole_batch):
    """3x3 convolution: one matrix product for the whole batch, or one per sample."""
    columns = patches(x)
    y = (
        (columns.reshape(-1, columns.shape[2]) @ weight).reshape(len(x), -1, CHANNELS)
        if whole_batch
        else columns @ weight
    )
    return np.ascontiguousarray(y.transpose(0, 2, 1)).reshape(len(x), CHANNELS, *EXTENT)


def policy(x, weight, whole_batch):
    """A linear layer over all of a sample: one matrix product for the whole batch, or one per sample."""
    rows = x.reshape(len(x), -1)
    return rows @ weight if whole_batch else np.stack([row @ weight for row in rows])


def layers(x, weights, states, head, whole_batch):
    """Yield (name, output) of every layer."""
    skip = None
    for i, (weight, state) in enumerate(zip(weights, states, strict=True)):
        x = convolve(x, weight, whole_batch)
        yield f"convolution {i}", x
        closes_block = i > 0 and i % 2 == 0
        x = cubn.forward(x, state, residual=skip if closes_block else None, relu=True)
        yield f"normalisation {i}", x
        skip = x if i % 2 == 0 else skip
    yield "policy head", policy(x, head, whole_batch)


def first_difference(x, network, whole_batch):
    """The first layer whose output for row 0 depends on the other rows, or None."""
    alone = layers(x[:1], *network, whole_batch)
    among = layers(x, *network, whole_batch)
    for (name, a), (_, b) in zip(alone, among, strict=True):
        if not np.array_equal(a[0], b[0]):
            return name
    return None


def random_state(rng):
    """A state as training might leave it."""
    state = cubn.BatchNormState(CHANNELS)
    state.gamma[:], state.beta[:] = rng.uniform(0.5, 1, CHANNELS), rng.normal(0, 0.1, CHANNELS)
    state.running_mean[:], state.running_var[:] = rng.normal(0, 1, CHANNELS), rng.uniform(1, 3, CHANNELS)
    return state


def main():
    rng = np.random.default_rng(0)
    inputs = [2] + [CHANNELS] * (2 * BLOCKS)
    weights = [rng.normal(0, (2 / (9 * C)) ** 0.5, (9 * C, CHANNELS)).astype(np.float32) for C in inputs]
    states = [random_state(rng) for _ in weights]
    head = rng.normal(0, 0.02, (CHANNELS * EXTENT[0] * EXTENT[1], MOVES)).astype(np.float32)
    network = weights, states, head
    x = rng.standard_normal((63, 2, *EXTENT), dtype=np.float32)

    difference = first_difference(x, network, whole_batch=False)
    print("one product per sample: first layer that depends on the batch:", difference)
    assert difference is None
    difference = first_difference(x, network, whole_batch=True)
    print("one product per batch:  first layer that depends on the batch:", difference)
    assert difference is None or difference.startswith(("convolution", "policy"))


if __name__ == "__main__":
    main()
