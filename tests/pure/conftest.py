"""No test here needs a kernel: the fixture below fails one that does."""

import pytest

from cubn.backends.cpu import cache
from tests.backends import forget_backends

MOVE = "a test in tests/pure needs a kernel: it belongs in another folder"


def refuse(*_):
    pytest.fail(MOVE, pytrace=False)


class NothingComputes:
    """A backend that may be looked for, but not used."""

    __getattr__ = refuse


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """No operation comes to the CPU backend, and no kernel is compiled, nor loaded from the cache.

    What `info` asks is whose threads would compute: where torch is loaded, that takes native code of the pool's.
    """
    load = cache.load
    monkeypatch.setattr("cubn.backends.cpu.backend", NothingComputes)
    monkeypatch.setattr(cache, "load", lambda name: load(name) if name.startswith("pool-") else refuse())
    forget_backends()
    yield
    forget_backends()
