"""The exception types, and the shape of every message a user sees."""

from __future__ import annotations


class BackendUnavailable(RuntimeError):
    """The device has no usable backend here; the message says which command or setting mends it."""


class CollectiveMismatch(ValueError):
    """Ranks disagree on what they are about to reduce; raised on every rank."""
