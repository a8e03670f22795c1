"""The named layers, each of which the planner cuts in its own way, to the bit."""

import pytest

from cubn.backends.cuda import plan
from tests.cuda.named import NAMED, run
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.runner import Order

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


@pytest.mark.parametrize("name", NAMED)
def test_named(name):
    run(name, Order.REVERSED)


@pytest.mark.parametrize("name", ["rows", "rows, few", "rows, odd, one channel"])
def test_elements_counted_in_64_bits(name, monkeypatch):
    """As beyond 2^31 elements."""
    monkeypatch.setattr(plan, "NARROW_INDEX", 0)
    run(name, Order.ASCENDING)


@pytest.mark.parametrize("name", ["rows, many samples", "values", "masked, many samples"])
def test_rows_merged_again_and_again(name, monkeypatch):
    """As of millions of samples."""
    monkeypatch.setattr(plan, "MERGED_ROWS", 4)
    monkeypatch.setattr(plan, "MOST_NODES", 64)
    run(name, Order.ASCENDING)
