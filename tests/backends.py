"""What a test does that puts one backend in the place of another."""

from cubn import _calls
from cubn.backends import backend_for


def forget_backends():
    """So that the next operation asks for its backend again, and prepares its call anew."""
    backend_for.cache_clear()
    _calls.clear()
