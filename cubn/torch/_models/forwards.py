"""Modules whose forward is that of a graph, in a class of their own that is a subclass of the one they had."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from cubn.errors import message, quoted


def can_be_given_forward(module: nn.Module) -> bool:
    """Whether it is none of those that are taken apart, as containers, or copied in ways of their own."""
    cls: Any = type(module)
    copied_as_usual = cls.__reduce__ is object.__reduce__ and not hasattr(cls, "__deepcopy__")
    return copied_as_usual and cls.forward is not nn.Sequential.forward


def give_forward(module: nn.Module, graph: fx.Graph, fixed: dict[str, Any]) -> None:
    """Let a module do what the graph says, as long as the attributes it was traced with stay as they are."""
    take_forward_back(module)
    cls = _new_class(type(module))
    _set_forward(cls, module, graph, fixed)
    vars(module)["_written"] = graph, fixed
    module.__class__ = cls


def written(module: nn.Module) -> Any:
    """The graph and attributes it was given, if so."""
    return vars(module).get("_written")


def take_forward_back(module: nn.Module) -> None:
    if vars(module).pop("_written", None) is not None:
        module.__class__ = type(module).__bases__[0]


def _new_class(cls: Any) -> type[nn.Module]:
    """It cannot be found by its name: copies and pickles make one anew."""

    class Written(cls):  # type: ignore[misc]
        __doc__ = cls.__doc__

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _blank, (cls,), *super().__reduce_ex__(protocol)[2:]

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            _set_forward(Written, self, *written(self))

    for name in ("__module__", "__name__", "__qualname__"):
        setattr(Written, name, getattr(cls, name))
    return Written


def _blank(cls: type[nn.Module]) -> nn.Module:
    new = _new_class(cls)
    return new.__new__(new)


def _set_forward(cls: type[nn.Module], module: nn.Module, graph: fx.Graph, fixed: dict[str, Any]) -> None:
    run: Any = type(fx.GraphModule(module, graph)).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, value in fixed.items():
            if getattr(self, name) != value:
                remedy = "Its forward was fused for that value: restore the model, change it, and convert it again."
                raise ValueError(message(name, f"stay {quoted(value)}", getattr(self, name), remedy, function="fuse"))
        return run(self, *args, **kwargs)

    cls.forward = forward
