"""Moments of all that one layer was trained on, pooled for a single update."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from cubn._moments import Moments
from cubn.moments import moments
from cubn.sync import Comm
from cubn.torch._passes.recomputation import recomputing


class Pool:
    """The Moments of a layer's inputs, one after the other; None before the first."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        if "torch._dynamo" in sys.modules:  # which takes seconds to import, and may trace what calls this
            self.add = torch.compiler.disable(self.add)  # type: ignore[method-assign, no-untyped-call]

    def add(self, x: Tensor, mask: Tensor | None, comm: Comm | None) -> None:
        """One more input, unless it has been counted."""
        if recomputing():
            return
        before = self.moments
        taken = moments(x.detach(), mask=mask, comm=comm, start=before.stop if before else 0)
        self.moments = before.merge(taken) if before else taken

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """As None, in a copy of the layer: what that is trained on is its own."""
        return type(None), ()
