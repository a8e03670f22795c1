"""scikit-learn's 8x8 digits, shuffled once, for training and validation."""

from functools import cache
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

TRAINING = 1400


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) of float32 in [0, 1], and their labels."""

    images: np.ndarray
    labels: np.ndarray


@cache
def digits():
    """(training, validation)"""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = (images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    labels = labels[order]
    return Digits(images[:TRAINING], labels[:TRAINING]), Digits(images[TRAINING:], labels[TRAINING:])
