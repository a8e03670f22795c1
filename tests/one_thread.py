"""A fixture of tests in which PyTorch computes on small arrays."""

import sys

import pytest


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    """Small arrays gain nothing of more, and those of two workers on two cores wait for each other, busily."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
