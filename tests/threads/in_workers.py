"""What worker processes are sent: they import it by name."""

import numpy as np

import cubn


def trained(seed):
    """A training step of several threads, to the bit."""
    x = np.random.default_rng(seed).standard_normal((16, 8, 64, 64), dtype=np.float32)
    y, saved = cubn.forward_train(x, cubn.BatchNormState(8))
    return [array.tobytes() for array in (y, *cubn.backward(x, saved)[:3])]


class Normalised:
    """A data set."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        import torch

        if i >= len(self):
            raise IndexError
        x = np.random.default_rng(i).standard_normal((16, 8, 64, 64), dtype=np.float32)
        return cubn.forward_train(torch.from_numpy(x), cubn.BatchNormState(8))[0]


def collated(items):
    import torch

    return cubn.forward_train(torch.cat(items), cubn.BatchNormState(8))[0]
