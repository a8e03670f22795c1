"""No test here needs a kernel: the fixture below fails one that does."""

import pytest

from tests.backends import forget_backends

MOVE = "a test in tests/pure needs a kernel: it belongs in another folder"


def refuse(*_):
    pytest.fail(MOVE, pytrace=False)


class NothingComputes:
    """A backend that may be looked for, but not used."""

    __getattr__ = refuse


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """No operation comes to the CPU backend, and no kernel is compiled, nor loaded from the cache."""
    monkeypatch.setattr("cubn.backends.cpu.backend", NothingComputes)
    monkeypatch.setattr("cubn.backends.cpu.cache.load", refuse)
    forget_backends()
    yield
    forget_backends()
