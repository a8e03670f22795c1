"""What a model does with each of its modules, read from its forwards by torch.fx, one forward at a time.

A module's children are not entered while it is traced: what is learnt of it holds however it is called. What torch.fx
would lose without a word (modes of torch, attributes set, a type asked for) is an error here.
"""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cubn.torch._models import forwards


class Untraceable(Exception):
    """With the reason."""


class Traced(NamedTuple):
    graph: fx.Graph
    fixed: dict[str, Any]
    """Attributes of plain values that were read: the graph holds for these values."""


class Site(NamedTuple):
    """One call of a module."""

    caller: nn.Module
    node: fx.Node


class Calls:
    """Every call of a module in a model, as far as a batch norm may take part.

    Attributes
    ----------
    paths : dict
        Of each module, all its paths.
    traced : dict
        Of each module whose forward calls others, and is the same in all modes.
    sites : dict
        Of each module, where it is called.
    unknown : dict
        Of each module that is used in ways that are not known, why.
    """

    def __init__(self, model: nn.Module, modes: tuple[bool, ...]) -> None:
        self.modes = modes
        self.paths: dict[nn.Module, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[module].append(path)
        self.traced: dict[nn.Module, Traced] = {}
        self.sites: dict[nn.Module, list[Site]] = defaultdict(list)
        self.unknown: dict[nn.Module, str] = {}
        self._visited: set[nn.Module] = set()
        self._visit(model)

    def _visit(self, module: nn.Module) -> None:
        if module in self._visited or isinstance(module, _BatchNorm) or not _holds_batch_norm(module):
            return
        self._visited.add(module)
        forward = f"the forward of {self.paths[module][0] or 'the model'}"
        try:
            traced = trace(module, self.modes)
        except Untraceable as reason:
            for held in module.modules():
                self.unknown.setdefault(held, f"{forward} cannot be traced: {reason}")
            return
        if len(traced) == 1:
            self.traced[module] = traced[0]
        for graph, _ in traced:
            for node in graph.nodes:
                if node.op == "get_attr":
                    owner, _, name = node.target.rpartition(".")
                    self.unknown.setdefault(module.get_submodule(owner), f"{forward} reads its {name}")
                if node.op == "call_module":
                    called = module.get_submodule(node.target)
                    self.sites[called].append(Site(module, node))
                    if len(traced) > 1:
                        self.unknown.setdefault(called, f"{forward} is another in training mode")
                    self._visit(called)

    def batch_norms(self) -> Iterator[tuple[str, _BatchNorm]]:
        """With their paths."""
        for module, paths in self.paths.items():
            if isinstance(module, _BatchNorm):
                yield paths[0], module

    def obstacle(self, module: nn.Module) -> str | None:
        """Why the only call of a module is not known, if so."""
        if module in self.unknown:
            return self.unknown[module]
        if len(self.sites[module]) != 1:
            return "it is called in several places" if self.sites[module] else "no forward calls it"
        if has_hooks(module):
            return "it has hooks"
        if "forward" in vars(module):
            return "a forward of its own was set on it"
        return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of a module are watched."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(kind) for kind in kinds)


def trace(module: nn.Module, modes: tuple[bool, ...]) -> list[Traced]:
    """A module's own forward with `training` as each of modes, or once where that makes no difference."""
    if "forward" in vars(module):
        raise Untraceable("it was set on the module")
    if (written := forwards.written(module)) is not None:
        return [Traced(*written)]
    traced = [_trace(module, training) for training in modes]
    same = len({graph.python_code("self").src for graph, _ in traced}) == 1
    return traced[:1] if same else traced


def _trace(module: nn.Module, training: bool) -> Traced:
    fixed: dict[str, Any] = {}
    try:
        twin = object.__new__(_watched(type(module), fixed))
        vars(twin).update(vars(module), training=training)
        vars(twin).update({table: dict(vars(module)[table]) for table in _TABLES})
        before = _held(twin)
        fixed.clear()
        graph = _Tracer().trace(twin)
    except Untraceable:
        raise
    except Exception as error:  # whatever the user's code does with what is no tensor
        raise Untraceable(str(error).split("\n")[0] or type(error).__name__) from error
    if _held(twin) != before:
        raise Untraceable("it sets attributes, or makes tensors")
    for node in graph.nodes:
        if node.op == "placeholder" and node.args and node.args[0] is None:
            raise Untraceable(f"its argument {node.target} is None by default")
    return Traced(graph, fixed)


class _Value(fx.Proxy):
    """A value that does not say what it is."""

    @property
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in ("abc", "typing"):
            frame = frame.f_back
        if not str(frame.f_globals.get("__name__")).startswith("torch."):
            raise Untraceable("it asks for the type of a value")
        return _Value

    @__class__.setter
    def __class__(self, cls: Any) -> None:
        raise AttributeError


def _in_place(operation: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))  # of these torch.fx makes new values


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **options: Any) -> fx.Node:
        if _modes() != self.modes:
            raise Untraceable("it sets a mode of torch's, as torch.no_grad and checkpoints do")
        return super().create_node(*args, **options)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Untraceable("it decides by a value")


def _modes() -> Any:
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # private; of a checkpoint
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, hooks and hooks(True)


def _watched(cls: type[nn.Module], fixed: dict[str, Any]) -> type[nn.Module]:
    """A subclass that notes which attributes of plain values are read."""

    def read(self: Any, name: str) -> Any:
        value = super(watched, self).__getattribute__(name)
        if type(value) in _PLAIN and name in vars(self) and name not in _OF_MODULES:
            fixed[name] = value
        return value

    watched: Any = type(cls.__name__, (cls,), {"__getattribute__": read})
    return watched  # type: ignore[no-any-return]


_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, str, type(None))
_OF_MODULES = {*vars(nn.Module()), "training"}


def _held(module: nn.Module) -> Any:
    """Which objects it holds."""
    tables = vars(module), *(vars(module)[name] for name in _TABLES)
    return [{name: id(value) for name, value in table.items()} for table in tables]


def _holds_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(held, _BatchNorm) for held in module.modules())
