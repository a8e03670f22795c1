"""Every operation with every option: dtype, layout, threads, library, mask, residual, ReLU, parameters, out, cut.

Any two values of any two options meet in a row below, with -m full several times. The whole product of the options a
result must not depend on, and of those that change it, runs with -m slow.
"""

import itertools

import pytest

from tests.conftest import BACKENDS
from tests.ops import cases
from tests.ops.pairwise import every_pair, others_full, whole_product

pytestmark = pytest.mark.usefixtures("eager_threads")

SEEDS = {"cpu": range(4), "cuda-on-cpu": [4], "cuda-on-cpu-passes": [5]}
SEEDED = [
    (seed, backend, row)
    for backend in SEEDS
    for seed in SEEDS[backend]
    for row in every_pair(cases.AXES, cases.allowed, seed)
]
ROWS = others_full([row for _, *row in SEEDED], [i for i, (seed, *_) in enumerate(SEEDED) if seed not in (1, 2, 3)])
PRODUCT = ["threads", "mask", "residual", "relu", "affine", "cut"]


@pytest.mark.parametrize(
    ("backend", "row"),
    ROWS,
    indirect=["backend"],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_every_pair_of_options_gives_the_oracle_s_bits(backend, row):
    cases.run(row)


def carried(backend):
    """Libraries and layouts: a backend sees addresses and strides alone, so that NumPy's are enough for the others."""
    libraries = cases.AXES["library"] if backend == "cpu" else ["numpy"]
    pairs = itertools.product(libraries, cases.AXES["layout"])
    return [pair for pair in pairs if cases.allowed(dict(zip(("library", "layout"), pair, strict=True)))]


@pytest.mark.slow
@pytest.mark.parametrize("operation", cases.AXES["operation"])
@pytest.mark.parametrize("dtype", cases.AXES["dtype"])
@pytest.mark.parametrize(
    ("backend", "library", "layout"),
    [(name, *pair) for name in BACKENDS for pair in carried(name)],
    indirect=["backend"],
)
def test_the_whole_product_gives_the_oracle_s_bits(backend, operation, dtype, library, layout):
    chosen = {"operation": [operation], "dtype": [dtype], "library": [library], "layout": [layout]}
    axes = {**cases.AXES, **chosen}
    if backend != "cpu":
        axes["threads"] = [1]
    for row in whole_product(axes, [*chosen, *PRODUCT], cases.allowed):
        try:
            cases.run(row)
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from error
