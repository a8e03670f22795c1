"""Fixtures of the operations' tests."""

import pytest

import cubn
from cubn import _calls
from cubn._kept import Kept
from cubn.backends.cpu import plan, prepare


@pytest.fixture(autouse=True)
def number_of_threads():
    """Put back the number of threads a test leaves."""
    before = cubn.get_num_threads()
    yield
    cubn.set_num_threads(before)


@pytest.fixture
def plans_anew():
    """Work out launches from plan's constants as they are during the test."""
    forget_launches()
    yield
    forget_launches()


def forget_launches():
    """Operations and their launches are prepared anew."""
    for function in vars(prepare).values():
        if isinstance(function, Kept):
            function.cache_clear()
    _calls.clear()


@pytest.fixture
def eager_threads(monkeypatch, plans_anew):
    """Wake threads for arrays of any size, so that small ones are cut between them too."""
    monkeypatch.setattr(plan, "SERIAL_BYTES", 0)


@pytest.fixture
def passes(request, monkeypatch, plans_anew):
    """How the CPU makes its elementwise passes: in the ways the parameter names, else those of larger arrays only."""
    if "streamed" in request.param:
        monkeypatch.setattr(plan, "STREAM_BYTES", 0)
    if "by position" in request.param:
        monkeypatch.setattr(plan, "FEW_CHANNELS", 0)
