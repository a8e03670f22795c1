"""Every operation with every option: dtype, layout, threads, library, mask, residual, ReLU, parameters, out, cut.

Any two values of any two options meet in a row below, several times. The whole product of the options a result must not
depend on, and of those that change it, runs with -m slow.
"""

import pytest

from tests.ops import cases
from tests.ops.pairwise import every_pair, whole_product

pytestmark = pytest.mark.usefixtures("eager_threads")

ROWS = [row for seed in range(4) for row in every_pair(cases.AXES, cases.allowed, seed)]
PRODUCT = ["threads", "mask", "residual", "relu", "affine", "cut"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_pairs_of_options(row, backend):
    cases.run(row)


@pytest.mark.slow
@pytest.mark.parametrize("operation", cases.AXES["operation"])
@pytest.mark.parametrize("dtype", cases.AXES["dtype"])
@pytest.mark.parametrize(
    ("library", "layout"),
    [(a, b) for a in cases.AXES["library"] for b in cases.AXES["layout"] if cases.allowed({"library": a, "layout": b})],
)
def test_the_whole_product(operation, dtype, library, layout, backend):
    chosen = {"operation": [operation], "dtype": [dtype], "library": [library], "layout": [layout]}
    for row in whole_product({**cases.AXES, **chosen}, [*chosen, *PRODUCT], cases.allowed):
        try:
            cases.run(row)
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from error
