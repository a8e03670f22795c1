"""Errors of what a user of PyTorch passed: in torch's words, and heard of by the ranks that wait."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cubn.sync import Comm
from cubn.sync.collective import together

_IN_TORCH = {
    r"\b(forward_train|forward_frozen|forward|update|BatchNormState)(?=: )": "batch_norm",
    r"\bforward or forward_frozen, which use\b": "eval() or freeze(), which take",
    r"\buse forward, which takes\b": "call eval(), which takes",
    r"; from_arrays takes both at once": "",
    r"\ba torch array\b": "a tensor",
    r"\bx\b": "input",
    r"\bgamma\b": "weight",
    r"\bbeta\b": "bias",
}
"""What the core's messages say, and what it is called in torch."""


@contextmanager
def in_torchs_words() -> Iterator[None]:
    """Let errors of the core name torch's arguments."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if error.args and isinstance(text := error.args[0], str):
            for theirs, ours in _IN_TORCH.items():
                text = re.sub(theirs, ours, text)
            error.args = (text, *error.args[1:])
        raise


@contextmanager
def heard_by(comm: Comm | None) -> Iterator[None]:
    """Let the other ranks, who wait for this one, know of an error before the exchange."""
    try:
        yield
    except BaseException:
        if comm is None:
            raise
        with together(comm):
            raise
