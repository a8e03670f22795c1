"""What may be changed: models that nothing else has read already."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from cubn.errors import a_type, message

_WRAPPERS = [
    ("torch.jit", "ScriptModule", "Convert the model it was made of, before torch.jit."),
    ("torch._dynamo", "OptimizedModule", "Convert the model before torch.compile: the one in its _orig_mod."),
    ("torch.nn.parallel", "DistributedDataParallel", "Convert the model before wrapping it: the one in its module."),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "Convert the model before sharding it."),
    ("torch.distributed.fsdp", "FSDPModule", "Convert the model before sharding it."),
]
"""Classes that hold on to what is in a model, and what to do instead."""


def check_model(model: nn.Module) -> None:
    """Refuse what is no model, or holds on to modules that are to change."""
    check_is_model(model)
    wrappers = list(_wrappers())
    for path, module in model.named_modules():
        for cls, remedy in wrappers:
            if isinstance(module, cls):
                got = a_type(module) + at(path)
                raise TypeError(message("model", "be a plain module with plain modules in it", got, remedy))


def check_is_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(message("model", "be a torch.nn.Module", a_type(model)))


def at(path: str) -> str:
    """Where in a model, in a message."""
    return f" at {path}" if path else ""


def _wrappers() -> Iterator[tuple[type, str]]:
    """Those that are imported: of others there are no modules."""
    for module, name, remedy in _WRAPPERS:
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None:
            yield cls, remedy
