"""The named layers, each of which the planner cuts in its own way, to the bit."""

import pytest

from cubn.backends.cuda.plan import passes, reductions
from tests.cuda import plans
from tests.cuda.named import NAMED, run
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.runner import Order

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


@pytest.mark.parametrize("name", NAMED)
def test_a_named_layer_gives_the_oracle_s_bits(name):
    run(name, Order.REVERSED)


@pytest.fixture
def limits_of_plans(monkeypatch):
    """Plans made with other limits than those of large arrays."""

    def change(module, **constants):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)

    plans.forget()
    yield change
    plans.forget()


@pytest.mark.parametrize("name", ["rows", "rows, few", "rows, odd, one channel"])
def test_elements_counted_in_64_bits(name, limits_of_plans):
    """As beyond 2^31 elements."""
    limits_of_plans(passes, NARROW_INDEX=0)
    launched = run(name, Order.ASCENDING)
    assert all("-DINDEX=size_t" in launch.options for launch in launched if launch.kernel == "apply_rows")
    assert any(launch.kernel == "apply_rows" for launch in launched)


@pytest.mark.parametrize("name", ["rows, many samples", "values", "masked, many samples"])
def test_rows_merged_again_and_again(name, limits_of_plans):
    """As of millions of samples."""
    limits_of_plans(reductions, MERGED_ROWS=4, MOST_NODES=64, MOST_ROUNDS=1)
    launched = run(name, Order.ASCENDING)
    merges = [dict(launch.fields) for launch in launched if launch.kernel == "merge_rows"]
    assert sum(merge["merged"] < merge["from_rows"] for merge in merges) > 1
