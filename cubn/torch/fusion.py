"""ReLU and residual additions made part of the batch norms before them."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin

from cubn.errors import reporting_as
from cubn.torch import modules
from cubn.torch._batch_norm import _BatchNorm
from cubn.torch._models import timm
from cubn.torch._models.forwards import can_be_given_forward, give_forward, take_forward_back
from cubn.torch._models.permitted import check_model
from cubn.torch._models.report import Report
from cubn.torch._models.tracing import Calls, has_hooks
from cubn.torch.sync_batch_norm import SyncBatchNorm, SyncBatchNormAddReLU, SyncBatchNormReLU

FUSED: dict[type, tuple[type[_BatchNorm], type[_BatchNorm]]] = {
    modules.BatchNorm1d: (modules.BatchNormReLU1d, modules.BatchNormAddReLU1d),
    modules.BatchNorm2d: (modules.BatchNormReLU2d, modules.BatchNormAddReLU2d),
    modules.BatchNorm3d: (modules.BatchNormReLU3d, modules.BatchNormAddReLU3d),
    SyncBatchNorm: (SyncBatchNormReLU, SyncBatchNormAddReLU),
    timm.BatchNormAct2d: (modules.BatchNormReLU2d, modules.BatchNormAddReLU2d),
    timm.SyncBatchNormAct: (SyncBatchNormReLU, SyncBatchNormAddReLU),
}
"""With a ReLU, and with a residual before it."""

RELUS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE: tuple[Any, ...] = (operator.iadd, "add_")

_LOG = logging.getLogger("cubn.torch")


class Pattern(NamedTuple):
    """A batch norm's call, and what may be done by it too."""

    bn: fx.Node
    relu: fx.Node
    sum: fx.Node | None = None
    residual: fx.Node | None = None


Found: TypeAlias = list[tuple[_BatchNorm, Pattern]]


@reporting_as("fuse")
def fuse(model: nn.Module) -> Report:
    """Let cubn's batch norms of a model do the ReLU after them too, and the addition of a residual between the two.

    y = relu(bn(x) + residual) in one pass: where torch.fx proves that nothing else reads the values between.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: a fused batch norm becomes a BatchNormReLU2d or BatchNormAddReLU2d at the same path, with the
        same parameters and buffers; the state_dict keeps its keys. A ReLU module that does nothing any more is passed
        over or an Identity. `restore` undoes it.

    Returns
    -------
    Report
        Which were fused, and why others were not. It is logged too, by the logger "cubn.torch" at INFO.

    Raises
    ------
    TypeError
        As from `convert`.

    Notes
    -----
    Each forward is traced alone, so what cannot be traced holds back its own part of a model only. A forward from which
    an addition or a function's ReLU is taken away runs as traced: the plain attributes it read (as `self.rate`) must
    then stay as they are, and are checked at each call. Its module gets a subclass of its own class. Not so a
    Sequential, which is sliced and appended to, or a class that has copies of its own kind.

    The bits of float32 and float64 are those of the modules one by one. In 16 bits the sum is rounded once, not twice.
    The residual must have bn(x)'s shape and dtype: no broadcasting.

    Examples
    --------
    >>> import cubn.torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), cubn.torch.BatchNorm2d(8), nn.ReLU())
    >>> print(cubn.torch.fuse(model))
    1: BatchNormReLU2d
    >>> type(model[2])
    <class 'torch.nn.modules.linear.Identity'>
    """
    check_model(model)
    calls = Calls(model, (True, False))
    report = Report()
    found = {caller: _found(caller, calls, report) for caller in calls.traced}
    for path, bn in calls.batch_norms():
        if (fused := _fused(bn, nn.ReLU)) is not None:
            _become(bn, fused[0], path, report)
        elif path not in report.left and not any(bn is other for pairs in found.values() for other, _ in pairs):
            report.left[path] = calls.obstacle(bn) or "no forward that can be traced calls it"
    for caller, pairs in found.items():
        _fuse(caller, pairs, calls, report)
    for line in str(report).splitlines():
        _LOG.info("fuse: %s", line)
    return report


def unfuse(model: nn.Module) -> None:
    """Undo it."""
    for module in list(model.modules()):
        take_forward_back(module)
        for name, relu in vars(module).pop("_replaced", {}).items():
            module._modules[name] = relu.train(module.get_submodule(name).training)
        if (cls := vars(module).pop("_unfused", None)) is not None:
            module.__class__ = cls


# --- finding ----------------------------------------------------------------------------------------------------------


def _found(caller: nn.Module, calls: Calls, report: Report) -> Found:
    """What can be fused in a forward; what cannot is reported."""
    found: Found = []
    taken: set[fx.Node] = set()
    for node in calls.traced[caller].graph.nodes:
        bn = caller.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
            continue
        pattern = _obstacle(bn, node, calls) or _pattern(node, caller)
        if isinstance(pattern, Pattern) and pattern.relu not in taken:
            found.append((bn, pattern))  # type: ignore[arg-type]
            taken.add(pattern.relu)
        else:
            why = pattern if isinstance(pattern, str) else "another batch norm takes the sum"
            report.left[calls.paths[bn][0]] = why
    return found


def _obstacle(bn: nn.Module, node: fx.Node, calls: Calls) -> str | None:
    if isinstance(bn, LazyModuleMixin):
        return "its channels are still to be counted: call the model once before"
    if _fused(bn) is None:
        return "it is none of cubn's that can be fused"
    if len(node.args) != 1 or node.kwargs:
        return "it is called with more than its input"
    return calls.obstacle(bn)


def _pattern(bn: fx.Node, caller: nn.Module) -> Pattern | str:
    """What follows a batch norm, or why it stays alone."""
    after = _reader(bn)
    if after is None:
        return "its output is read in several places"
    if _is_relu(after, caller):
        return Pattern(bn, after)
    residual = _residual(after, bn)
    if residual is None:
        return "no ReLU follows"
    relu = _reader(after)
    if relu is None or not _is_relu(relu, caller):
        return "no ReLU alone follows the addition"
    if after.prev is not bn and not _may_move(bn, caller):
        return "its input may change before the addition"
    return Pattern(bn, relu, after, residual)


def _reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(node: fx.Node, caller: nn.Module) -> bool:
    if node.op == "call_module":
        module = caller.get_submodule(str(node.target))
        return type(module) is nn.ReLU and not has_hooks(module) and "forward" not in vars(module)
    plain = len(node.args) == 1 and node.kwargs.keys() <= {"inplace"}
    return node.op in ("call_function", "call_method") and node.target in RELUS and plain


def _residual(node: fx.Node, bn: fx.Node) -> fx.Node | None:
    """What is added to a batch norm's output, if that is all that is done."""
    if node.op not in ("call_function", "call_method") or node.target not in SUMS or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if first is bn:
        return second
    return None if node.target in IN_PLACE else first  # in place, it is the residual that changes


def _may_move(bn: fx.Node, caller: nn.Module) -> bool:
    """Whether its input is the same later: memory of a layer's own that nothing else reads."""
    source = bn.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
        return False
    return isinstance(caller.get_submodule(str(source.target)), (nn.modules.conv._ConvNd, nn.Linear))


def _fused(
    bn: nn.Module, activation: type[nn.Module] = nn.Identity
) -> tuple[type[_BatchNorm], type[_BatchNorm]] | None:
    """What it may become, if the activation it has itself is this one."""
    parts = timm.activation(bn) or ()
    has = {type(part) for part in parts} - {nn.Identity} or {nn.Identity}
    return FUSED.get(type(bn)) if has == {activation} and not any(map(has_hooks, parts)) else None


# --- changing ---------------------------------------------------------------------------------------------------------


def _fuse(caller: nn.Module, found: Found, calls: Calls, report: Report) -> None:
    """ReLU modules called nowhere else become Identity; for the rest the forward is written anew."""
    idle = [(bn, pattern) for bn, pattern in found if _is_idle(caller, pattern, calls)]
    if len(idle) == len(found) or not can_be_given_forward(caller):
        why = f"its ReLU cannot be taken out of the forward of a {type(caller).__name__}"
        report.left |= {calls.paths[bn][0]: why for bn, _ in found}
        found = idle
        for _, pattern in found:
            _replace_relu(caller, str(pattern.relu.target))
    else:
        graph, fixed = calls.traced[caller]
        _rewrite(graph, [pattern for _, pattern in found])
        give_forward(caller, graph, fixed)
    for bn, pattern in found:
        fused = _fused(bn)
        assert fused is not None
        _become(bn, fused[pattern.sum is not None], calls.paths[bn][0], report)


def _replace_relu(caller: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    holder = caller.get_submodule(owner)
    relu = holder.get_submodule(name)
    vars(holder).setdefault("_replaced", {})[name] = relu
    holder._modules[name] = nn.Identity().train(relu.training)


def _is_idle(caller: nn.Module, pattern: Pattern, calls: Calls) -> bool:
    if pattern.sum is not None or pattern.relu.op != "call_module":
        return False
    relu = caller.get_submodule(str(pattern.relu.target))
    return len(calls.paths[relu]) == 1 and calls.obstacle(relu) is None


def _rewrite(graph: fx.Graph, patterns: Sequence[Pattern]) -> None:
    for bn, relu, sum, residual in patterns:
        if sum is None:
            relu.replace_all_uses_with(bn)
            graph.erase_node(relu)
            continue
        with graph.inserting_before(sum):
            fused = graph.call_module(str(bn.target), (bn.args[0], residual))
        relu.replace_all_uses_with(fused)
        for node in (relu, sum, bn):
            graph.erase_node(node)


def _become(bn: nn.Module, cls: type[_BatchNorm], path: str, report: Report) -> None:
    vars(bn)["_unfused"] = type(bn)
    bn.__class__ = cls
    report.done[path] = cls.__name__
    report.left.pop(path, None)
