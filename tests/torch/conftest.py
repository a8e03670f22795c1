"""What is said once in a process is said once in each test."""

import pytest


@pytest.fixture(autouse=True)
def nothing_said():
    pytest.importorskip("torch")
    from cubn.torch import _batch_norm

    _batch_norm._say_that_statistics_stay_wide.cache_clear()
