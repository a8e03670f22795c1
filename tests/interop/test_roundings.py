"""Values that are computed on the host and given to a library: rounded once, whatever the library."""

import numpy as np
import pytest

from cubn import _arrays
from tests import oracle
from tests.interop import libraries
from tests.ops import arrays


def between(dtype):
    """float64 numbers at, just below and just above what lies between two neighbours of a dtype, and all around it."""
    rng = np.random.default_rng(0)
    store = arrays.STORES[dtype]
    bits = rng.integers(0, 1 << 16, 500, dtype=np.uint16)
    low = {"bfloat16": bits, "float16": bits.view(np.float16)}.get(dtype, rng.standard_normal(500).astype(store))
    low = oracle.widen(low)
    low = low[np.isfinite(low)].astype(np.float64)
    middle = low + abs(low) * 2.0 ** -{"float16": 11, "bfloat16": 8, "float32": 24}[dtype]
    wild = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e300, -1e300, 1e-320, 3.4e38, 3.3961e38, 65519.99999, 1e-45]
    return np.concatenate([low, middle, middle * (1 - 2**-40), middle * (1 + 2**-40), wild])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_results_are_rounded_once(library, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    if not libraries.can_carry(library, dtype, "nchw"):
        pytest.skip(f"{library} has no {dtype}")
    like = _arrays.describe(libraries.carry(np.zeros(1, arrays.STORES[dtype]), library), "like")
    values = between(dtype)
    made = _arrays.describe(like.library.from_numpy(values, dtype, like), "made")
    expected = oracle.narrow(values, arrays.STORES[dtype])
    assert made.dtype == dtype or (library in libraries.FOREIGN and dtype == "bfloat16" and made.dtype == "float32")
    np.testing.assert_array_equal(made.library.to_numpy(made), oracle.widen(expected))
