"""Every kernel once, by small arrays, against the CPU backend: the first thing to run, and what the sanitizers watch.

python -m tests.gpu.smoke                 every layout and dtype
python -m tests.gpu.smoke --small         a few of them: sanitizers are slow
python -m tests.gpu.smoke --no-pools      every allocation is the driver's own, so that its end is known
"""

import argparse

import cupy
import numpy as np

from tests.gpu import device_arrays
from tests.gpu.results import run_everything
from tests.ops import arrays

SHAPES = {
    "resident": (3, 10, 30),
    "resident, grouped": (4, 9, 7),
    "resident, cluster": (4, 3, 5000),
    "two passes": (2, 2, 600_001),
    "resident, channels": (30, 12, 6),
    "resident, 2-d": (70, 24),
    "resident, 2-d, cluster": (3000, 40),
    "2-d": (70_000, 16),
}
SMALL = ("resident, grouped", "resident, cluster", "two passes", "resident, channels", "resident, 2-d, cluster", "2-d")


def check(name, dtype, layout):
    rng = np.random.default_rng(0)
    stores = [arrays.in_memory(arrays.normal(rng, SHAPES[name], dtype, centre=0.5), layout, 1) for _ in range(3)]
    got = run_everything(*map(device_arrays.to_cupy, stores))
    for what, expected in run_everything(*(arrays.carry(store, "numpy") for store in stores)).items():
        arrays.assert_same(device_arrays.store_of(got[what]), arrays.store_of(expected), f"{name} {dtype} {what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-pools", action="store_true")
    options = parser.parse_args()
    if options.no_pools:
        cupy.cuda.set_allocator(None)
    print("device:", cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    for name in SMALL if options.small else SHAPES:
        for dtype in ("bfloat16", "float32") if options.small else arrays.DTYPES:
            for layout in ("dense", "channels_last", "sliced"):
                check(name, dtype, layout)
                print("as on the CPU:", name, dtype, layout, flush=True)


if __name__ == "__main__":
    main()
