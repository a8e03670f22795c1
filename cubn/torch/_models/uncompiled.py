"""Models without what `torch.compile` made of them, for as long as hooks are to be heard."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_lock = Lock()
_users = 0
_stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled forwards would not call hooks that are new.

    The stance of the compiler is the process's. Of several threads the first takes it, and the last gives it back: one
    that gave back what it had found would leave another's behind.
    """
    global _users, _stance
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with _lock:
        if not _users:
            _stance = torch.compiler.set_stance("force_eager")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _stance.__exit__(None, None, None)
