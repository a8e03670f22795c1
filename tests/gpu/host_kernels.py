"""Compile the CPU's kernels that the GPU's results are compared with, one process for each dtype and layout.

python -m tests.gpu.host_kernels
"""

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from tests.gpu.results import run_everything
from tests.ops import arrays

SHAPES = {"dense": (3, 10, 30), "channels_last": (3, 10, 30), "sliced": (3, 10, 30), "one position": (70, 24)}
"""One of each kind that the CPU backend tells apart."""


def compile_for(dtype, layout):
    """By running every operation once; what was compiled is kept in the cache on disk."""
    store = arrays.normal(np.random.default_rng(0), SHAPES[layout], dtype)
    x = arrays.carry(arrays.in_memory(store, layout if layout in ("channels_last", "sliced") else "dense", 1), "numpy")
    run_everything(x, x, x)


if __name__ == "__main__":
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_for, *zip(*itertools.product(arrays.DTYPES, SHAPES), strict=True)))
