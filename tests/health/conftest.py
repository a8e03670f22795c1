"""Fixtures of all tests of health."""

from tests.one_thread import one_thread_of_torch  # noqa: F401
