"""No test here needs a kernel: the fixture below fails one that does."""

import pytest

from cubn import _arguments

MOVE = "a test in tests/pure needs a kernel: it belongs in another folder"


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """Neither is there a backend that arrays could be computed on, nor a kernel that it could be asked for."""

    def refuse(*_):
        pytest.fail(MOVE, pytrace=False)

    monkeypatch.setattr("cubn.backends.cpu.backend", refuse)
    monkeypatch.setattr("cubn.backends.cpu.cache.load", refuse)
    _arguments.backend.cache_clear()
    yield
    _arguments.backend.cache_clear()
